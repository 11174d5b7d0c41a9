"""Megatron-Bridge and NeMo 2: a gathered state dict, with fused attention and feed-forward inputs.

Source: Megatron-Bridge (2026-08), `peft/dora.py`, `peft/dora_layers.py`,
`models/conversion/param_mapping.py`. Their own checkpoints are torch-dist folders (`.distcp`),
which Megatron alone gathers. What is read is the `.adapter.` entries of the gathered state dict in
one file, beside two documents: the base's `config.json`, for the heads, and `adapter_config.json`
with `dim`, `alpha` and `tensor_model_parallel_size` of the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dora_convert.core.adapter import Adapter, BiasRule, DoraModule, MagnitudeAxis
from dora_convert.core.assembly import linear, magnitude
from dora_convert.core.bundle import Bundle, Json
from dora_convert.core.deltas import LowRank
from dora_convert.core.fields import Fields
from dora_convert.core.heads import Heads, heads
from dora_convert.core.protocols import AdapterFormat
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError

__all__ = ["FORMAT", "MegatronFormat"]

_CONFIG = "adapter_config.json"
_BASE = "config.json"
_PARTS: Final = {
    "down": "linear_in.weight",
    "up": "linear_out.weight",
    "magnitude": "weight_magnitude",
}
_NAME = re.compile(
    r"^(?:module\.)*decoder\.layers\.(?P<number>\d+)\."
    r"(?P<inner>self_attention\.linear_qkv|self_attention\.linear_proj|mlp\.linear_fc1|"
    r"mlp\.linear_fc2)\.adapter\.(?P<part>linear_in\.weight|linear_out\.weight|weight_magnitude)$"
)
_QKV, _PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
_FC1, _FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
_ROW_PARALLEL = (_PROJ, _FC2)
_RECIPE = ("dim", "alpha", "tensor_model_parallel_size")
_SHARDS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class _Model:
    """What the base's config says of shapes. `shards`: tensor-parallel processes in training."""

    heads: Heads
    hidden: int
    inner: int
    shards: int

    def shape(self, layer: str, *, rows: int) -> tuple[int, int]:
        """`[out, in]` of one layer; a feed-forward input is gated unless it has half the rows."""
        heads = self.heads
        query = heads.query * heads.dim
        return {
            _QKV: (query + 2 * heads.groups * heads.dim, self.hidden),
            _PROJ: (self.hidden, query),
            _FC1: (self.inner if rows == self.inner else 2 * self.inner, self.hidden),
            _FC2: (self.hidden, self.inner),
        }[layer]


class MegatronFormat:
    """DoRA as Megatron-Bridge trains it."""

    title = "Megatron-Bridge, NeMo 2 (gathered state dict)"
    weights = "adapter_model.safetensors"

    def detect(self, bundle: Bundle) -> bool:
        """Whether factors lie under Megatron's `.adapter.`."""
        return any(name.endswith(".adapter.linear_in.weight") for name in bundle.tensors)

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """See `AdapterFormat.read`."""
        problems: list[str] = []
        fields = _recipe(bundle, problems)
        model = _model(bundle.documents.get(_BASE), fields, problems)
        modules = _modules(bundle, fields, model, problems)
        if axis is MagnitudeAxis.IN:
            problems.append("a magnitude is one per output in Megatron's layout")
        if problems:
            raise InputError(
                "the adapter cannot be used as it is", where=str(bundle.root), problems=problems
            )
        return Adapter(format="megatron", modules=modules)

    def write(self, adapter: Adapter) -> Bundle:
        """See `AdapterFormat.write`: never possible."""
        raise InputError(
            "Megatron's layout cannot be written",
            problems=[
                "q, k and v share one linear_in there, as gate and up do; here each has its own",
                "its checkpoints are torch-dist folders, which Megatron alone writes",
            ],
        )


def _recipe(bundle: Bundle, problems: list[str]) -> Fields:
    config = bundle.documents.get(_CONFIG)
    fields = Fields(config or {}, _CONFIG, problems)
    if config is None:
        problems.append(
            f"{_CONFIG} is missing: put one there with {', '.join(_RECIPE)} of the recipe"
        )
        return fields
    for key in _RECIPE:
        if not fields.has(key):
            fields.reject(key, "is missing: it is part of the training recipe")
    return fields


def _model(config: Json | None, fields: Fields, problems: list[str]) -> _Model | None:
    if config is None:
        problems.append(
            f"{_BASE} is missing: put the base model's there, it says how many heads are fused "
            "into linear_qkv"
        )
        return None
    base = Fields(config, _BASE, problems)
    if base.has("attention_output_gate") or base.has("attn_output_gate"):
        problems.append(f"{_BASE}: linear_qkv of a gated attention holds more than q, k and v")
        return None
    found = heads(config)
    if found is None or not base.has("hidden_size") or not base.has("intermediate_size"):
        problems.append(
            f"{_BASE}: num_attention_heads, hidden_size and intermediate_size are needed to tell "
            "apart what Megatron fuses"
        )
        return None
    return _Model(
        found,
        base.count("hidden_size", 1),
        base.count("intermediate_size", 1),
        fields.count("tensor_model_parallel_size", 1),
    )


def _modules(
    bundle: Bundle, fields: Fields, model: _Model | None, problems: list[str]
) -> dict[str, DoraModule]:
    scaling = fields.number("alpha", 1.0) / fields.count("dim", 1)
    stored = _sort(bundle, problems)
    if not stored:
        problems.append("the file holds no DoRA module")
    modules: dict[str, DoraModule] = {}
    for (number, layer), tensors in sorted(stored.items()):
        name = f"decoder.layers.{number}.{layer}"
        whole = _whole(name, tensors, scaling, problems)
        if whole is None or model is None:
            continue
        _check_rank(whole, fields, problems)
        if _fits(whole, layer, model, problems):
            for path, module in _parts(f"model.layers.{number}.", layer, whole, model):
                modules[path] = module
    return modules


def _sort(bundle: Bundle, problems: list[str]) -> dict[tuple[int, str], dict[str, TensorRef]]:
    found: dict[tuple[int, str], dict[str, TensorRef]] = {}
    parts = {suffix: part for part, suffix in _PARTS.items()}
    for name, ref in bundle.tensors.items():
        match = _NAME.match(name)
        if match is None:
            problems.append(f"{ref.stored.name} {list(ref.stored.shape)} is not understood")
            continue
        layer = found.setdefault((int(match["number"]), match["inner"]), {})
        part = parts[match["part"]]
        if part in layer:
            problems.append(f"{layer[part].stored.name} and {ref.stored.name} are the same part")
        layer[part] = ref
    return found


def _whole(
    name: str,
    tensors: Mapping[str, TensorRef],
    scaling: float,
    problems: list[str],
) -> DoraModule | None:
    """One layer as it is stored, under Megatron's name."""
    missing = [suffix for part, suffix in _PARTS.items() if part not in tensors]
    if missing:
        problems += [f"{name}: {suffix} is missing" for suffix in missing]
        return None
    delta = linear(name, tensors["down"], tensors["up"], problems)
    if delta is None:
        return None
    vector = magnitude(name, tensors["magnitude"], delta.shape, problems, axis=MagnitudeAxis.OUT)
    if vector is None:
        return None
    # It adds the bias of linear_qkv itself, before it scales; of the others the caller does.
    rule = BiasRule.SCALED if name.endswith(_QKV) else BiasRule.KEEP
    return DoraModule(name, delta, *vector, scaling, bias_rule=rule)


def _check_rank(module: DoraModule, fields: Fields, problems: list[str]) -> None:
    assert module.delta is not None
    rank = fields.count("dim", module.delta.rank)
    if rank != module.delta.rank:
        problems.append(
            f"{module.path}: {_CONFIG} says dim {rank}, the tensors have rank {module.delta.rank}"
        )


def _fits(module: DoraModule, layer: str, model: _Model, problems: list[str]) -> bool:
    """Whether this is a whole layer, whose magnitudes mean what they should."""
    assert module.delta is not None
    before = len(problems)
    shape = module.delta.shape
    expected = model.shape(layer, rows=shape[0])
    if shape != expected:
        shards = [
            n
            for n in _SHARDS
            if (shape[0] * n, shape[1]) == expected or (shape[0], shape[1] * n) == expected
        ]
        gated = (expected[0] + model.heads.query * model.heads.dim, expected[1])
        why = ""
        if shards:
            why = f": one of {shards[0]} tensor-parallel shards, to be gathered by Megatron first"
        elif layer == _QKV and shape == gated:
            why = ": a gated attention, whose linear_qkv holds more than q, k and v"
        problems.append(f"{module.path}: {list(shape)}, the base has {list(expected)}{why}")
    if layer == _FC1 and model.inner % model.shards:
        problems.append(
            f"{module.path}: {model.inner} rows are not shared out by {model.shards} processes"
        )
    if layer in _ROW_PARALLEL and model.shards > 1:
        problems.append(
            f"{module.path}: trained on {model.shards} tensor-parallel processes, each of which "
            "took the norm of its own columns; the norm of whole rows was never known, so no "
            "merge is the trained model"
        )
    return len(problems) == before


def _parts(
    prefix: str, layer: str, whole: DoraModule, model: _Model
) -> Iterator[tuple[str, DoraModule]]:
    """The layers that transformers has for one of Megatron's; all share its `down`."""
    assert whole.factors is not None
    assert whole.magnitude is not None
    down = whole.factors.down
    ups = _cut(layer, whole.factors.up, model)
    vectors = _cut(layer, whole.magnitude, model)
    for name, up in ups.items():
        path = prefix + name
        yield (
            path,
            DoraModule(
                path,
                LowRank(down, up),
                vectors[name],
                whole.axis,
                whole.scaling,
                bias_rule=whole.bias_rule,
            ),
        )


def _cut(layer: str, ref: TensorRef, model: _Model) -> dict[str, TensorRef]:
    rows, *rest = ref.spec.shape
    if layer == _PROJ:
        return {"self_attn.o_proj": ref}
    if layer == _FC2:
        return {"mlp.down_proj": ref}
    if layer == _FC1 and rows == model.inner:
        return {"mlp.up_proj": ref}
    if layer == _FC1:
        # Every process has rows of the gate, and then as many of the other.
        width = model.inner // model.shards
        split = ref.reshaped(model.shards, 2, width, *rest)
        names = ("mlp.gate_proj", "mlp.up_proj")
        return {
            name: split.narrowed(1, i, i + 1).reshaped(model.inner, *rest)
            for i, name in enumerate(names)
        }
    # Rows by group: the query heads that it serves, its key head, its value head.
    found = model.heads
    served = found.query // found.groups
    split = ref.reshaped(found.groups, served + 2, found.dim, *rest)
    spans = {"q": (0, served), "k": (served, served + 1), "v": (served + 1, served + 2)}
    return {
        f"self_attn.{name}_proj": split.narrowed(1, start, stop).reshaped(
            found.groups * (stop - start) * found.dim, *rest
        )
        for name, (start, stop) in spans.items()
    }


FORMAT: Final[AdapterFormat] = MegatronFormat()
