"""torchtune's own `adapter_model.pt`, with the rows of q and k in torchtune's order.

Source: torchtune at its last commit (2026-04), `modules/peft/dora.py`, `models/convert_weights.py`.
Names are torchtune's: `layers.0.attn.output_proj`, `layers.0.mlp.w1`. Its forward multiplies the
bias with `m / ||V||` as well. What it exports for PEFT beside this file is read as PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dora_convert.core.adapter import Adapter, BiasRule, DoraModule, MagnitudeAxis, RowOrder
from dora_convert.core.assembly import linear, magnitude
from dora_convert.core.bundle import Bundle
from dora_convert.core.capacity import Capacity, losses
from dora_convert.core.fields import Fields
from dora_convert.core.peft_files import alpha_of
from dora_convert.core.protocols import AdapterFormat
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError

__all__ = ["FORMAT", "TorchtuneFormat"]

_CONFIG = "adapter_config.json"
_PARTS: Final = {"down": "lora_a.weight", "up": "lora_b.weight", "magnitude": "magnitude"}
_LAYER = re.compile(r"^layers\.(?P<number>\d+)\.(?P<inner>\w+\.\w+)$")
_MODULE = re.compile(r"^model\.layers\.(?P<number>\d+)\.(?P<inner>\w+\.\w+)$")
_NAMES: Final = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_BACK: Final = {path: name for name, path in _NAMES.items()}
_ROTARY = (".q_proj", ".k_proj")
_CAPACITY = Capacity(bias=BiasRule.SCALED, plain=True, one_scaling=True)


class TorchtuneFormat:
    """Checkpoints of torchtune's recipes.

    Which of two orders its rows of q and k are in depends on the family of the base: they are
    marked INTERLEAVED, and settled with the base at hand.
    """

    title = "torchtune"
    weights = "adapter_model.pt"

    def detect(self, bundle: Bundle) -> bool:
        """Whether factors go by torchtune's names."""
        return any(name.endswith(".lora_a.weight") for name in bundle.tensors)

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """See `AdapterFormat.read`."""
        problems: list[str] = []
        notes: list[str] = []
        if _CONFIG not in bundle.documents:
            problems.append(
                f"{_CONFIG} is missing: some of torchtune's checkpointers write none; put one "
                "there with the recipe's lora_rank and lora_alpha as r and lora_alpha"
            )
        fields = Fields(bundle.documents.get(_CONFIG, {}), _CONFIG, problems)
        for key in ("r", "lora_alpha"):
            if bundle.documents.get(_CONFIG) and not fields.has(key):
                fields.reject(key, "is missing: the scaling cannot be told without it")
        rank, alpha = fields.count("r", 8), fields.number("lora_alpha", 8.0)
        modules = {}
        for path, tensors in sorted(_sort(bundle, problems).items()):
            module = _module(path, tensors, alpha / rank, axis or MagnitudeAxis.OUT, problems)
            if module is not None:
                modules[path] = module
        _check(modules, rank, problems, notes)
        adapter = Adapter(
            format="torchtune",
            modules=modules,
            base_model=fields.text("base_model_name_or_path") or None,
            notes=tuple(notes),
        )
        if problems:
            raise InputError(
                "the adapter cannot be used as it is", where=str(bundle.root), problems=problems
            )
        return adapter

    def write(self, adapter: Adapter) -> Bundle:
        """See `AdapterFormat.write`; rows of q and k are to be marked as torchtune's."""
        problems = losses(_without_marks(adapter), _CAPACITY)
        names = {path: _stored_name(path) for path in adapter.modules}
        problems += [
            f"{path}: torchtune's models have no module that becomes this one"
            for path, name in names.items()
            if name is None
        ]
        problems += [
            f"{path}: the order of its rows in torchtune depends on the base: give the base"
            for path, module in adapter.modules.items()
            if path.endswith(_ROTARY) and not _is_marked(module)
        ]
        ranks = {m.delta.rank for m in adapter.modules.values() if m.delta is not None}
        if len(ranks) > 1:
            problems.append(f"it has one rank for all modules, here are {len(ranks)}")
        if len({module.magnitude is None for module in adapter.modules.values()}) > 1:
            problems.append("some modules have a magnitude and some have none")
        if problems:
            raise InputError("torchtune's layout cannot hold this adapter", problems=problems)
        tensors = {
            f"{name}.{_PARTS[part]}": ref
            for path, name in names.items()
            for part, ref in _tensors(adapter.modules[path]).items()
        }
        rank = min(ranks, default=8)
        scaling = next((module.scaling for module in adapter.modules.values()), 1.0)
        config = {
            "r": rank,
            "lora_alpha": alpha_of(scaling, rank),
            "target_modules": sorted({path.rpartition(".")[2] for path in adapter.modules}),
            "peft_type": "LORA",
        }
        if adapter.base_model is not None:
            config["base_model_name_or_path"] = adapter.base_model
        named = {name: ref.renamed(name) for name, ref in tensors.items()}
        return Bundle(Path(), named, {_CONFIG: config})


def _sort(bundle: Bundle, problems: list[str]) -> dict[str, dict[str, TensorRef]]:
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, ref in bundle.tensors.items():
        for part, suffix in _PARTS.items():
            path = _path(name.removesuffix(f".{suffix}"))
            if name.endswith(f".{suffix}") and path is not None:
                modules.setdefault(path, {})[part] = ref
                break
        else:
            problems.append(f"{ref.stored.name} {list(ref.stored.shape)} is not understood")
    return modules


def _path(name: str) -> str | None:
    """The module path of transformers; None for what is not in a plain decoder of torchtune's."""
    if name == "output":
        return "lm_head"
    found = _LAYER.match(name)
    inner = _NAMES.get(found["inner"]) if found else None
    return f"model.layers.{found['number']}.{inner}" if found and inner else None


def _stored_name(path: str) -> str | None:
    """The inverse of `_path`."""
    if path == "lm_head":
        return "output"
    found = _MODULE.match(path)
    inner = _BACK.get(found["inner"]) if found else None
    return f"layers.{found['number']}.{inner}" if found and inner else None


def _module(
    path: str,
    tensors: Mapping[str, TensorRef],
    scaling: float,
    axis: MagnitudeAxis,
    problems: list[str],
) -> DoraModule | None:
    missing = [suffix for part, suffix in _PARTS.items() if part not in tensors]
    if not {"down", "up"} <= tensors.keys():
        problems.extend(f"{path}: {suffix} is missing" for suffix in missing)
        return None
    delta = linear(path, tensors["down"], tensors["up"], problems)
    if delta is None:
        return None
    order = RowOrder.INTERLEAVED if path.endswith(_ROTARY) else RowOrder.SAME
    if "magnitude" not in tensors:
        # Its plain LoRA adds the bias as it is.
        return DoraModule(
            path, delta, None, MagnitudeAxis.OUT, scaling, up_order=order, magnitude_order=order
        )
    resolved = magnitude(path, tensors["magnitude"], delta.shape, problems, axis=axis)
    if resolved is None:
        return None
    return DoraModule(
        path,
        delta,
        *resolved,
        scaling,
        bias_rule=BiasRule.SCALED,
        up_order=order,
        magnitude_order=order,
    )


def _check(
    modules: Mapping[str, DoraModule], rank: int, problems: list[str], notes: list[str]
) -> None:
    for path, module in modules.items():
        if module.delta is not None and module.delta.rank != rank:
            problems.append(
                f"{path}: {_CONFIG} says rank {rank}, the tensors have rank {module.delta.rank}"
            )
    without = [path for path, module in modules.items() if module.magnitude is None]
    if not modules:
        problems.append("the file holds no LoRA or DoRA module")
    elif len(without) == len(modules):
        notes.append("plain LoRA: the adapter holds no magnitude")
    else:
        problems.extend(f"{path}: magnitude is missing" for path in without)


def _tensors(module: DoraModule) -> dict[str, TensorRef]:
    assert module.factors is not None
    found = {"down": module.factors.down, "up": module.factors.up}
    return found if module.magnitude is None else {**found, "magnitude": module.magnitude}


def _is_marked(module: DoraModule) -> bool:
    return {module.up_order, module.magnitude_order} == {RowOrder.INTERLEAVED}


def _without_marks(adapter: Adapter) -> Adapter:
    same = RowOrder.SAME
    modules = {
        path: replace(module, up_order=same, magnitude_order=same)
        if path.endswith(_ROTARY) and _is_marked(module)
        else module
        for path, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


FORMAT: Final[AdapterFormat] = TorchtuneFormat()
