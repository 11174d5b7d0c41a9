"""NVIDIA's reference implementation: `adapter_model.bin` with `weight_m_wdecomp`.

Source: NVlabs/DoRA, `commonsense_reasoning`, a fork of peft 0.3. Its config has `peft_type: DORA`
and no `use_dora`; modules under `Wdecompose_target_modules` have a magnitude and no low-rank
part. `dora_simple` concerns the gradient alone and changes nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from dora_convert.core.adapter import Adapter, DoraModule, LowRank, MagnitudeAxis
from dora_convert.core.assembly import check_axes, check_replaced, linear, magnitude
from dora_convert.core.bundle import Bundle
from dora_convert.core.fields import Fields
from dora_convert.core.protocols import AdapterFormat
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError

__all__ = ["FORMAT", "NvidiaFormat"]

_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PARTS: Final = {
    "down": re.compile(r"^(?P<path>.+)\.lora_A\.weight$"),
    "up": re.compile(r"^(?P<path>.+)\.lora_B\.weight$"),
    "magnitude": re.compile(r"^(?P<path>.+)\.weight_m_wdecomp\.weight$"),
}


class NvidiaFormat:
    """What the paper's authors trained with."""

    title = "NVIDIA DoRA reference (commonsense_reasoning)"

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
        if not fields.has("lora_alpha") and any("down" in parts for parts in modules.values()):
            fields.reject("lora_alpha", "is missing: the reference has no default for it")
        rank, alpha = fields.count("r", 8), fields.number("lora_alpha", 1.0)
        adapter = Adapter(
            format="nvidia",
            modules=_modules(modules, rank, alpha / rank, axis, problems),
            replaced=_replaced(plain, fields, problems),
            base_model=fields.text("base_model_name_or_path") or None,
            task=fields.text("task_type"),
        )
        if problems:
            raise InputError(
                "the adapter cannot be used as it is", where=str(bundle.root), problems=problems
            )
        return adapter


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
        name = stored.removeprefix(_PREFIX)
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
) -> dict[str, DoraModule]:
    modules: dict[str, DoraModule] = {}
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
        module = _module(path, delta, vector, scaling, axis, problems)
        if module is not None:
            modules[path] = module
    if axis is None:
        check_axes(modules.values(), problems)
    if not stored:
        problems.append("the file holds no DoRA module")
    return modules


def _module(
    path: str,
    delta: LowRank | None,
    vector: TensorRef,
    scaling: float,
    axis: MagnitudeAxis | None,
    problems: list[str],
) -> DoraModule | None:
    """The reference stores `[out, 1]`; the length is all that a magnitude-only module has."""
    size = vector.spec.numel
    shape = delta.shape if delta is not None else (size, size)
    # What is shaped otherwise was not written by the reference, and is asked about.
    by_format = MagnitudeAxis.OUT if vector.spec.shape in ((size,), (size, 1)) else None
    resolved = magnitude(path, vector, shape, problems, axis=axis or by_format)
    if resolved is None:
        return None
    return DoraModule(path, delta, resolved[0], resolved[1], scaling)


def _replaced(
    plain: Mapping[str, TensorRef], fields: Fields, problems: list[str]
) -> dict[str, TensorRef]:
    to_save = fields.strings("modules_to_save")
    biases = fields.text("bias") == "all"
    replaced = {}
    for name, ref in plain.items():
        path, _, leaf = name.rpartition(".")
        if any(path.endswith(key) for key in to_save) or (biases and leaf == "bias"):
            replaced[name] = ref
        else:
            problems.append(f"{ref.stored.name} {list(ref.stored.shape)} is not understood")
    check_replaced(replaced, problems)
    return replaced


FORMAT: Final[AdapterFormat] = NvidiaFormat()
