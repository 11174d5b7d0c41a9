"""NVIDIA's reference implementation: `adapter_model.bin` with `weight_m_wdecomp`.

Source: NVlabs/DoRA, `commonsense_reasoning`, a fork of peft 0.3. Its config has `peft_type: DORA`
and no `use_dora`; modules under `Wdecompose_target_modules` have a magnitude and no low-rank
part. `dora_simple` concerns the gradient alone and changes nothing here.

`visual_instruction_tuning` (LLaVA) is a fork of peft 0.4: its config spells
`wdecompose_target_modules`, its trainer puts the magnitudes into `non_lora_trainables.bin`, where
the projector lies too, and layers with a magnitude alone compute as the base does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from dora_convert.core.adapter import Adapter, DoraModule, MagnitudeAxis
from dora_convert.core.assembly import check_replaced, common_axis, linear, magnitude
from dora_convert.core.bundle import Bundle
from dora_convert.core.capacity import Capacity, losses
from dora_convert.core.deltas import LowRank
from dora_convert.core.fields import Fields
from dora_convert.core.peft_files import PEFT_PREFIX, alpha_of
from dora_convert.core.protocols import AdapterFormat
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError

__all__ = ["FORMAT", "NvidiaFormat"]

_CONFIG = "adapter_config.json"
_PARTS: Final = {
    "down": re.compile(r"^(?P<path>.+)\.lora_A(?:\.default)?\.weight$"),
    "up": re.compile(r"^(?P<path>.+)\.lora_B(?:\.default)?\.weight$"),
    "magnitude": re.compile(r"^(?P<path>.+)\.weight_m_wdecomp(?:\.default)?\.weight$"),
}
# How the LLaVA fork spells what the other spells with a capital: its mark.
_LLAVA = "wdecompose_target_modules"
_PROJECTOR = "mm_projector"
_CAPACITY = Capacity(magnitude_only=True, one_scaling=True, replaced=True)


class NvidiaFormat:
    """What the paper's authors trained with."""

    title = "NVIDIA DoRA reference (commonsense reasoning, LLaVA)"
    weights = "adapter_model.bin"

    def detect(self, bundle: Bundle) -> bool:
        """Whether magnitudes go by the reference's own name."""
        return any(".weight_m_wdecomp." in name for name in bundle.tensors) or (
            bundle.documents.get(_CONFIG, {}).get("peft_type") == "DORA"
        )

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """See `AdapterFormat.read`."""
        problems: list[str] = []
        if _CONFIG not in bundle.documents:
            problems.append(f"{_CONFIG} is missing: it holds the scaling (lora_alpha and r)")
        fields = Fields(bundle.documents.get(_CONFIG, {}), _CONFIG, problems)
        _check_config(fields)
        modules, plain = _sort(bundle, problems)
        notes = _drop_unused(modules) if _LLAVA in bundle.documents.get(_CONFIG, {}) else ()
        if not fields.has("lora_alpha") and any("down" in parts for parts in modules.values()):
            fields.reject("lora_alpha", "is missing: the reference has no default for it")
        rank, alpha = fields.count("r", 8), fields.number("lora_alpha", 1.0)
        layers, is_axis_open = _modules(modules, rank, alpha / rank, axis, problems)
        adapter = Adapter(
            format="nvidia",
            modules=layers,
            replaced=_replaced(plain, fields, problems),
            base_model=fields.text("base_model_name_or_path") or None,
            task=fields.text("task_type"),
            is_axis_open=is_axis_open,
            notes=notes,
        )
        if problems:
            raise InputError(
                "the adapter cannot be used as it is", where=str(bundle.root), problems=problems
            )
        return adapter

    def write(self, adapter: Adapter) -> Bundle:
        """See `AdapterFormat.write`; in the spelling of the commonsense fork."""
        problems = losses(adapter, _CAPACITY)
        ranks = {m.delta.rank for m in adapter.modules.values() if m.delta is not None}
        if len(ranks) > 1:
            problems.append(f"it has one rank for all modules, here are {len(ranks)}")
        saved = {n.rpartition(".")[0] for n in adapter.replaced if not n.endswith(".bias")}
        if problems:
            raise InputError("NVIDIA's layout cannot hold this adapter", problems=problems)
        tensors = {
            f"{PEFT_PREFIX}{path}.{name}": ref
            for path, module in adapter.modules.items()
            for name, ref in _stored(module)
        }
        tensors |= {PEFT_PREFIX + name: ref for name, ref in adapter.replaced.items()}
        with_factors = [p for p, m in adapter.modules.items() if m.delta is not None]
        scaling = next((adapter.modules[path].scaling for path in with_factors), 1.0)
        rank = min(ranks, default=8)
        config = {
            "peft_type": "DORA",
            "task_type": adapter.task,
            "base_model_name_or_path": adapter.base_model,
            "r": rank,
            "lora_alpha": alpha_of(scaling, rank),
            "target_modules": sorted(with_factors),
            "Wdecompose_target_modules": sorted(adapter.modules.keys() - set(with_factors)) or None,
            "lora_dropout": 0.0,
            "dora_simple": False,
            "merge_weights": False,
            "fan_in_fan_out": False,
            "enable_lora": None,
            "bias": "all" if any(n.endswith(".bias") for n in adapter.replaced) else "none",
            "modules_to_save": sorted(saved) or None,
            "inference_mode": True,
        }
        named = {name: tensors[name].renamed(name) for name in sorted(tensors)}
        return Bundle(Path(), named, {_CONFIG: config})


def _stored(module: DoraModule) -> Iterator[tuple[str, TensorRef]]:
    if module.factors is not None:
        yield "lora_A.weight", module.factors.down
        yield "lora_B.weight", module.factors.up
    assert module.magnitude is not None
    yield "weight_m_wdecomp.weight", module.magnitude.reshaped(module.magnitude.spec.numel, 1)


def _drop_unused(modules: dict[str, dict[str, TensorRef]]) -> tuple[str, ...]:
    unused = [path for path, parts in modules.items() if parts.keys() == {"magnitude"}]
    for path in unused:
        del modules[path]
    if not unused:
        return ()
    return (
        f"{len(unused)} modules have a magnitude alone, which this trainer's forward does not use: "
        "they stay as the base has them",
    )


def _check_config(fields: Fields) -> None:
    if fields.flag("fan_in_fan_out"):
        fields.reject(
            "fan_in_fan_out", "is true: the reference's forward and its merge disagree about it"
        )
    if fields.has("enable_lora"):
        fields.reject("enable_lora", "is set: the reference does not define DoRA for it")


def _sort(
    bundle: Bundle, problems: list[str]
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    modules: dict[str, dict[str, TensorRef]] = {}
    plain: dict[str, TensorRef] = {}
    for stored, ref in bundle.tensors.items():
        name = stored.removeprefix(PEFT_PREFIX)
        for part, pattern in _PARTS.items():
            found = pattern.match(name)
            if found is not None:
                # Training in 8 bit wraps the head in a Sequential (CastOutputToFloat).
                path = re.sub(r"(^|\.)lm_head\.0$", r"\1lm_head", found["path"])
                if modules.setdefault(path, {}).setdefault(part, ref) is not ref:
                    problems.append(f"{path}: {stored} comes twice under different names")
                break
        else:
            plain[name] = ref
    return modules, plain


def _modules(
    stored: Mapping[str, Mapping[str, TensorRef]],
    rank: int,
    scaling: float,
    axis: MagnitudeAxis | None,
    problems: list[str],
) -> tuple[dict[str, DoraModule], bool]:
    """By path, and whether the axis of their magnitudes is open."""
    modules: dict[str, DoraModule] = {}
    undecided: list[str] = []
    for path, tensors in sorted(stored.items()):
        if "magnitude" not in tensors:
            problems.append(f"{path}: weight_m_wdecomp is missing")
            continue
        if len({"down", "up"} & tensors.keys()) == 1:
            part = "lora_B" if "down" in tensors else "lora_A"
            problems.append(f"{path}: {part} is missing")
            continue
        vector, delta = tensors["magnitude"], None
        if "down" in tensors:
            delta = linear(path, tensors["down"], tensors["up"], problems)
            if delta is None:
                continue
            if delta.rank != rank:
                problems.append(
                    f"{path}: {_CONFIG} says rank {rank}, the tensors have rank {delta.rank}"
                )
        resolved = _vector(path, delta, vector, problems, axis=axis, undecided=undecided)
        if resolved is not None:
            modules[path] = DoraModule(path, delta, resolved[0], resolved[1], scaling)
    if not stored:
        problems.append("the file holds no DoRA module")
    if axis is not None:
        return modules, False
    return common_axis(modules, undecided, problems)


def _vector(
    path: str,
    delta: LowRank | None,
    stored: TensorRef,
    problems: list[str],
    *,
    axis: MagnitudeAxis | None,
    undecided: list[str],
) -> tuple[TensorRef, MagnitudeAxis] | None:
    """The reference stores `[out, 1]`; the length is all that a magnitude-only module has."""
    size = stored.spec.numel
    shape = delta.shape if delta is not None else (size, size)
    # What is shaped otherwise was not written by the reference, and is asked about.
    by_format = MagnitudeAxis.OUT if stored.spec.shape in ((size,), (size, 1)) else None
    known = axis or by_format
    if delta is None and known is None:
        problems.append(
            f"{path}: the magnitude {list(stored.spec.shape)} may belong to the outputs or to the "
            "inputs: say which with --axis"
        )
        return None
    return magnitude(path, stored, shape, problems, axis=known, undecided=undecided)


def _replaced(
    plain: Mapping[str, TensorRef], fields: Fields, problems: list[str]
) -> dict[str, TensorRef]:
    to_save = fields.strings("modules_to_save")
    biases = fields.text("bias") == "all"
    replaced = {}
    for name, ref in plain.items():
        path, _, leaf = name.rpartition(".")
        projector = _PROJECTOR in path.split(".")
        if projector or any(path.endswith(key) for key in to_save) or (biases and leaf == "bias"):
            replaced[name] = ref
        else:
            problems.append(f"{ref.stored.name} {list(ref.stored.shape)} is not understood")
    check_replaced(replaced, problems)
    return replaced


FORMAT: Final[AdapterFormat] = NvidiaFormat()
