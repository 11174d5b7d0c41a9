"""Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors` or `.bin`.

Source: peft 0.9 to 0.21, `tuners/lora/` and `utils/save_and_load.py`. A key is
`base_model.model.<module path>.<part>`; raw state dict dumps insert the adapter's name before
`.weight`, and wrappers such as torch.compile insert theirs into the path.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from dora_convert.core.adapter import (
    Adapter,
    BiasRule,
    DoraModule,
    LayerKind,
    MagnitudeAxis,
    RowOrder,
    TokenRows,
)
from dora_convert.core.assembly import (
    check_replaced,
    common_axis,
    convolution,
    linear,
    magnitude,
)
from dora_convert.core.bundle import Bundle, Json
from dora_convert.core.embeddings import HEADS, INPUTS
from dora_convert.core.fields import Fields
from dora_convert.core.peft_config import CONFIG, refuse_unmergeable, scalings, token_indices
from dora_convert.core.peft_files import PEFT_PREFIX, peft_bundle
from dora_convert.core.protocols import AdapterFormat
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError

__all__ = ["FORMAT", "PeftFormat"]

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# The end of a key -> what the tensor is. The adapter's name, where present, is dropped.
_NAME = r"(?:\.(?!weight$)(?P<adapter>[^.]+))?"
_PARTS: Final = {
    part: re.compile(rf"^(?P<path>.+?)\.{pattern}$")
    for part, pattern in {
        "down": rf"lora_A{_NAME}\.weight",
        "up": rf"lora_B{_NAME}\.weight",
        "embedding_a": rf"lora_embedding_A{_NAME}",
        "embedding_b": rf"lora_embedding_B{_NAME}",
        "magnitude": rf"lora_magnitude_vector{_NAME}(?:\.weight)?",
        "tokens": rf"token_adapter\.trainable_tokens_delta{_NAME}",
        "weight": r"(?:token_adapter\.)?base_layer\.weight",
        "bias": r"(?:token_adapter\.)?base_layer\.bias",
    }.items()
}
_SAVED = re.compile(r"^(?P<path>.+?)\.modules_to_save\.(?P<rest>.+)$")
_ORIGINAL = ".original_module."


@dataclass(slots=True)
class _Parts:
    """The tensors of a file by module path and part, and those that belong to no module.

    `saved` are those under `modules_to_save`, by path and what comes after.
    """

    modules: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    saved: list[tuple[str, str, TensorRef]] = field(default_factory=list)
    plain: dict[str, TensorRef] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


class PeftFormat:
    """The format that most trainers write, and that all others are compared with."""

    title = "Hugging Face PEFT"
    weights = "adapter_model.safetensors"

    def detect(self, bundle: Bundle) -> bool:
        """Whether LoRA tensors lie beside a config that is not of NVIDIA's fork."""
        if bundle.documents.get(CONFIG, {}).get("peft_type") == "DORA":
            return False
        return CONFIG in bundle.documents and any(
            ".lora_A." in name or ".lora_embedding_A" in name for name in bundle.tensors
        )

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """See `AdapterFormat.read`."""
        config = bundle.documents[CONFIG]
        problems: list[str] = []
        notes: list[str] = []
        fields = Fields(config, CONFIG, problems)
        refuse_unmergeable(config, fields)
        parts = _sort(bundle, problems)
        modules, is_axis_open = _modules(parts, fields, axis, problems)
        _check_magnitudes(modules, fields, problems, notes)
        if _is_of_torchtune(config, modules):
            modules = {path: _as_torchtune_left_it(module) for path, module in modules.items()}
            notes.append(_TORCHTUNE)
        replaced = _replaced(parts, fields, problems, notes)
        token_rows = _token_rows(parts, config, problems)
        adapter = Adapter(
            format="peft",
            modules=modules,
            replaced=replaced,
            token_rows=token_rows,
            base_model=fields.text("base_model_name_or_path") or None,
            task=fields.text("task_type"),
            keeps_ties=fields.flag("ensure_weight_tying"),
            meets_transposed=fields.flag("fan_in_fan_out"),
            is_axis_open=is_axis_open,
            notes=tuple(notes),
        )
        if problems:
            raise InputError(
                "the adapter cannot be used as it is",
                where=str(bundle.root),
                problems=problems,
                hint="Tensors that may be left out are named with --ignore GLOB."
                if any("not understood" in p for p in problems)
                else "",
            )
        return adapter

    def write(self, adapter: Adapter) -> Bundle:
        """See `AdapterFormat.write`."""
        return peft_bundle(adapter)


def _sort(bundle: Bundle, problems: list[str]) -> _Parts:
    parts = _Parts()
    for name, ref in bundle.tensors.items():
        _place(parts, _clean(name), ref, problems)
    _unwrap_saved(parts)
    if len(parts.names) > 1:
        problems.append(
            f"the file holds several adapters ({', '.join(sorted(parts.names))}); "
            "save the one that you want by itself"
        )
    return parts


def _clean(name: str) -> str:
    # DistributedDataParallel wraps the whole model once.
    return _WRAPPERS.sub("", name.removeprefix("module.")).removeprefix(PEFT_PREFIX)


def _place(parts: _Parts, name: str, ref: TensorRef, problems: list[str]) -> None:
    for part, pattern in _PARTS.items():
        found = pattern.match(name)
        if found is None:
            continue
        adapter = found.groupdict().get("adapter")
        if adapter is not None:
            parts.names.add(adapter)
        module = parts.modules.setdefault(found["path"], {})
        if part in module:
            other = module[part].stored.name
            problems.append(f"{other} and {ref.stored.name} are the same part of one module")
        module[part] = ref
        return
    saved = _SAVED.match(name)
    if saved is not None:
        parts.saved.append((saved["path"], saved["rest"], ref))
    elif _ORIGINAL not in name:
        parts.plain[name] = ref


def _unwrap_saved(parts: _Parts) -> None:
    """Take `modules_to_save`, and in a raw dump the adapter's name after it, out of the names.

    The first piece of the rest is an adapter's name or a part of the module: in a raw dump it is
    the name that the LoRA tensors carry as well. What is trained wins over a plain copy.
    """
    raw = bool(parts.names) or any(rest.startswith("default.") for _, rest, _ in parts.saved)
    for path, rest, ref in parts.saved:
        name = rest
        if raw and "." in rest:
            adapter, _, name = rest.partition(".")
            parts.names.add(adapter)
        parts.plain[f"{path}.{name}"] = ref
        parts.trained.add(f"{path}.{name}")


def _modules(
    parts: _Parts, fields: Fields, axis: MagnitudeAxis | None, problems: list[str]
) -> tuple[dict[str, DoraModule], bool]:
    """By path, and whether the axis of their magnitudes is open."""
    adapted = {
        path: tensors
        for path, tensors in parts.modules.items()
        if tensors.keys() & {"down", "up", "embedding_a", "embedding_b", "magnitude"}
    }
    ranks = {
        path: ref.spec.shape[0]
        for path, tensors in adapted.items()
        if (ref := tensors.get("down") or tensors.get("embedding_a"))
        and ref.spec.shape
        and ref.spec.numel
    }
    by_path = scalings(sorted(adapted), ranks, fields, problems)
    modules: dict[str, DoraModule] = {}
    undecided: list[str] = []
    for path, tensors in sorted(adapted.items()):
        module = _module(path, tensors, by_path[path], axis, problems, undecided)
        if module is not None:
            modules[path] = module
    if not adapted:
        problems.append("the file holds no LoRA or DoRA module")
    if axis is not None:
        return modules, False
    return common_axis(modules, undecided, problems)


def _module(
    path: str,
    tensors: Mapping[str, TensorRef],
    scaling: float,
    axis: MagnitudeAxis | None,
    problems: list[str],
    undecided: list[str],
) -> DoraModule | None:
    embedding = "embedding_a" in tensors or "embedding_b" in tensors
    first, second = ("embedding_a", "embedding_b") if embedding else ("down", "up")
    missing = [part for part in (first, second) if part not in tensors]
    if missing:
        labels = {"down": "lora_A", "up": "lora_B", "embedding_a": "lora_embedding_A"}
        found = ", ".join(ref.stored.name for ref in tensors.values())
        for part in missing:
            label = labels.get(part, "lora_embedding_B")
            problems.append(f"{path}: {label} is missing (there is {found})")
        return None
    a, b = tensors[first], tensors[second]
    if embedding:
        # A [rank, vocab], B [dim, rank]; the update of the stored [vocab, dim] is (B @ A).T.
        matrices = len(a.spec.shape) == 2 and len(b.spec.shape) == 2
        delta = linear(path, b.transposed(), a.transposed(), problems) if matrices else None
        if not matrices:
            problems.append(f"{path}: expected two matrices for an embedding")
    else:
        delta = (convolution if len(a.spec.shape) > 2 else linear)(path, a, b, problems)
    if delta is None:
        return None
    weight = tensors.get("weight")
    if weight is not None and not weight.stored.dtype.is_weight:
        problems.append(
            f"{path}: its base weight in the file is {weight.stored.dtype.label}, a quantised one"
        )
        return None
    vector = tensors.get("magnitude")
    found_axis = MagnitudeAxis.IN if embedding else MagnitudeAxis.OUT
    if vector is not None:
        # A vector has no direction of its own: PEFT's are always per output of the layer.
        given = axis if axis is not None and not embedding else None
        by_format = found_axis if _follows_peft(vector, delta.shape, found_axis) else None
        known = given or by_format
        resolved = magnitude(path, vector, delta.shape, problems, axis=known, undecided=undecided)
        if resolved is None:
            return None
        vector, found_axis = resolved
    kind = LayerKind.EMBEDDING if embedding else LayerKind.LINEAR
    if len(a.spec.shape) > 2:
        kind = LayerKind.CONVOLUTION
    return DoraModule(path, delta, vector, found_axis, scaling, weight, kind)


def _follows_peft(vector: TensorRef, shape: tuple[int, int], axis: MagnitudeAxis) -> bool:
    """Whether the magnitude has a shape that PEFT itself writes: `[n]`, or `[1, out, 1...]`."""
    length = shape[0] if axis is MagnitudeAxis.OUT else shape[1]
    stored = vector.spec.shape
    return stored in ((length,), (length, 1)) or (len(stored) > 2 and stored[1] == length)


def _check_magnitudes(
    modules: Mapping[str, DoraModule], fields: Fields, problems: list[str], notes: list[str]
) -> None:
    """Tensors against `use_dora`: PEFT itself ignores both kinds of contradiction in silence."""
    without = [path for path, module in modules.items() if module.magnitude is None]
    declared = fields.flag("use_dora")
    if without and len(without) == len(modules):
        if declared:
            problems.append(
                f"{CONFIG} says use_dora, but none of the {len(modules)} modules has a magnitude: "
                "whoever wrote it dropped them, as Megatron-Bridge, NeMo and PEFT's conversion of "
                "PiSSA have done, and what they were cannot be recovered from this file"
            )
        else:
            notes.append("plain LoRA: the adapter holds no magnitude")
    elif without:
        problems.extend(f"{path}: lora_magnitude_vector is missing" for path in without)
    elif modules and not declared:
        notes.append(f"{CONFIG} does not say use_dora, but the magnitudes are there: taken as DoRA")


_TORCHTUNE = (
    "written by torchtune, by its config: rows of q and k are put into the base's order, and a "
    "bias is scaled as torchtune's forward does; adapter_model.pt of the same folder is safer"
)


def _is_of_torchtune(config: Json, modules: Mapping[str, DoraModule]) -> bool:
    """Its exporter writes these keys and no other, least of all use_dora."""
    keys = config.keys() - {"base_model_name_or_path"}
    return keys == {"r", "lora_alpha", "target_modules", "peft_type"} and any(
        module.magnitude is not None for module in modules.values()
    )


def _as_torchtune_left_it(module: DoraModule) -> DoraModule:
    """It reorders the rows of lora_B, and forgets those of the magnitude; see `settle`."""
    rotary = module.path.endswith((".q_proj", ".k_proj"))
    order = RowOrder.INTERLEAVED if rotary else RowOrder.SAME
    return replace(module, magnitude_order=order, bias_rule=BiasRule.SCALED)


def _replaced(
    parts: _Parts, fields: Fields, problems: list[str], notes: list[str]
) -> dict[str, TensorRef]:
    """Tensors that were trained whole: modules_to_save, biases, resized embeddings."""
    replaced = {}
    to_save = frozenset(fields.strings("modules_to_save"))
    sizes = {len(key) for key in to_save}
    bias = fields.text("bias") or "none"
    for path, tensors in parts.modules.items():
        # In a raw dump also where it was not trained: it is what the weight was trained with.
        if "bias" in tensors:
            replaced[f"{path}.bias"] = tensors["bias"]
    for name, ref in parts.plain.items():
        path, _, leaf = name.rpartition(".")
        if (
            name in parts.trained
            or _is_saved(path, to_save, sizes)
            # PEFT trains whatever has bias in its name, such as T5's relative_attention_bias.
            or (bias == "all" and "bias" in name)
            or (bias != "none" and leaf == "bias")
            # PEFT adds these of itself when the vocabulary was resized (save_embedding_layers).
            or (leaf in ("weight", "bias") and path.rpartition(".")[2] in (*INPUTS, *HEADS))
        ):
            replaced[name] = ref
        else:
            problems.append(f"{ref.stored.name} {list(ref.stored.shape)} is not understood")
    if bias == "lora_only" and not any(name.endswith(".bias") for name in replaced):
        notes.append(
            "biases were trained (bias is 'lora_only'), but PEFT before 0.21 did not save them: "
            "those of the base are used, as PEFT does"
        )
    check_replaced(replaced, problems)
    return replaced


def _is_saved(path: str, to_save: Collection[str], sizes: Iterable[int]) -> bool:
    """PEFT's rule: some enclosing module's path ends with the key, at any character.

    `sizes` are those of the keys, of which there may be very many.
    """
    ends = itertools.accumulate(map(len, path.split(".")), lambda end, size: end + 1 + size)
    return any(path[end - size : end] in to_save for end in ends for size in sizes if size <= end)


def _token_rows(parts: _Parts, config: Json, problems: list[str]) -> dict[str, TokenRows]:
    """`trainable_tokens_delta`: despite its name these are the rows themselves, in config order."""
    rows: dict[str, TokenRows] = {}
    for path, tensors in parts.modules.items():
        ref = tensors.get("tokens")
        if ref is None:
            continue
        indices = token_indices(path, config.get("trainable_token_indices"))
        if indices is None or len(ref.spec.shape) != 2 or len(indices) != ref.spec.shape[0]:
            problems.append(
                f"{path}: {list(ref.spec.shape)} trained token rows do not go with "
                f"trainable_token_indices in {CONFIG}"
            )
        elif len(set(indices)) != len(indices):
            problems.append(f"{path}: trainable_token_indices names a token twice")
        elif not indices or not ref.stored.dtype.is_weight:
            what = f"{list(ref.spec.shape)} {ref.stored.dtype.label}"
            problems.append(f"{path}: trained token rows cannot be {what}")
        else:
            rows[path] = TokenRows(indices, ref, tensors.get("weight"))
    return rows


FORMAT: Final[AdapterFormat] = PeftFormat()
