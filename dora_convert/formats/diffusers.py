"""diffusers' `pytorch_lora_weights.safetensors`, as its scripts, SimpleTuner and OneTrainer save.

Source: diffusers 0.42, `loaders/lora_base.py`, `utils/peft_utils.py`. A key is PEFT's with the
component before it: `transformer.<module>.lora_A.weight`, `.lora_magnitude_vector`. The LoRA's
config is in the file's header, if at all, as `lora_adapter_metadata`: JSON with `transformer.r` and
the like. Without it diffusers takes alpha for the rank, whatever was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dora_convert.core.adapter import Adapter, DoraModule, LayerKind, MagnitudeAxis
from dora_convert.core.bundle import Bundle, Json
from dora_convert.core.capacity import Capacity, losses
from dora_convert.core.fields import Fields
from dora_convert.core.image_adapter import (
    COMPONENTS,
    ImageParts,
    alpha_divisor,
    image_layout,
    image_modules,
    image_parts,
    whole_adapter,
)
from dora_convert.core.peft_config import refuse_unmergeable, scalings
from dora_convert.core.peft_files import lora_config, peft_parts, unlike
from dora_convert.core.protocols import AdapterFormat
from dora_convert.core.tensors import COMPONENT_MARK, TensorRef
from dora_convert.errors import InputError

__all__ = ["FORMAT", "DiffusersFormat"]

_HEADER = "lora_adapter_metadata"
_CAPACITY = Capacity(kinds=frozenset({LayerKind.CONVOLUTION}), plain=True, pipelines=True)
# What decides the scales, and what PEFT has to know to make the layers.
_KEPT = (
    *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "r"),
    *("rank_pattern", "target_modules", "use_dora", "use_rslora"),
)
# Factors of text encoders have names of their own (DIFFUSERS_TO_PEFT in utils/state_dict_utils.py),
# and transformers 5 drops, with a warning, a magnitude without the last part of its name.
_TEXT = {
    "lora_magnitude_vector": "lora_magnitude_vector.weight",
    "lora_A.weight": "lora_linear_layer.down.weight",
    "lora_B.weight": "lora_linear_layer.up.weight",
}


class DiffusersFormat:
    """One file for all components of a pipeline."""

    title = "diffusers, SimpleTuner"
    weights = "pytorch_lora_weights.safetensors"

    def detect(self, bundle: Bundle) -> bool:
        """Whether factors go by PEFT's names with a component's before them."""
        return image_layout(bundle) == "diffusers"

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """See `AdapterFormat.read`."""
        problems: list[str] = []
        notes: list[str] = []
        parts = image_parts(bundle, problems)
        config = _config(bundle.metadata, problems)
        found: dict[str, float] = {}
        for component in _components(parts):
            found |= _scalings(component, parts, config, problems)
        if not config:
            notes.append(
                "the file does not say its alpha: taken as the rank, as diffusers takes it; if it "
                "was trained with another, pass --scale ALPHA/RANK"
            )
        modules = image_modules(parts, found, axis, problems)
        without = [path for path, module in modules.items() if module.magnitude is None]
        if 0 < len(without) < len(modules):
            # PEFT trains one for each; where it is missing diffusers takes that of the start.
            problems += [f"{path}: lora_magnitude_vector is missing" for path in without]
        return whole_adapter("diffusers", bundle, parts, modules, notes=notes, problems=problems)

    def write(self, adapter: Adapter) -> Bundle:
        """See `AdapterFormat.write`; for the models of a pipeline, whose names come first."""
        problems = losses(adapter, _CAPACITY) + unlike(adapter)
        problems += [
            f"{path}: of which model of a pipeline is not known: give the pipeline as the base"
            for path in adapter.modules
            if COMPONENT_MARK not in path and not adapter.is_place_open
        ]
        if problems:
            raise InputError("diffusers' layout cannot hold this adapter", problems=problems)
        tensors: dict[str, TensorRef] = {}
        config: dict[str, Any] = {}
        for component, own in _by_component(adapter).items():
            names = _TEXT if component.startswith("text_encoder") else {}
            for path, module in own.modules.items():
                for part, ref in peft_parts(module):
                    tensors[f"{component}.{path}.{names.get(part, part)}"] = ref
            settings = lora_config(own)
            config |= {f"{component}.{key}": settings[key] for key in _KEPT}
        renamed = {name: tensors[name].renamed(name) for name in sorted(tensors)}
        text = json.dumps(config, indent=2, sort_keys=True)
        return Bundle(Path(), renamed, metadata={"format": "pt", _HEADER: text})


def _by_component(adapter: Adapter) -> dict[str, Adapter]:
    """What the adapter has for each model of a pipeline, with the paths in that."""
    modules: dict[str, dict[str, DoraModule]] = {}
    for full, module in adapter.modules.items():
        component, _, path = full.partition(COMPONENT_MARK)
        modules.setdefault(component, {})[path] = module
    return {name: replace(adapter, modules=own) for name, own in sorted(modules.items())}


def _components(parts: ImageParts) -> list[str]:
    """The names before the paths, dots included; none for paths that have none."""
    return sorted({_component(path) for path in parts.modules})


def _component(path: str) -> str:
    return next((name for name in COMPONENTS if path.startswith(name)), "")


def _config(metadata: Mapping[str, str], problems: list[str]) -> Json:
    text = metadata.get(_HEADER)
    if text is None:
        return {}
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        problems.append(f"{_HEADER} in the file's header is not a JSON object")
        return {}
    return found


def _scalings(
    component: str, parts: ImageParts, config: Json, problems: list[str]
) -> dict[str, float]:
    """`alpha / rank` of one component's modules, by its part of the config."""
    paths = [path for path in parts.modules if _component(path) == component]
    own = {k.removeprefix(component): v for k, v in config.items() if k.startswith(component)}
    if not own:
        return dict.fromkeys(paths, 1.0)
    fields = Fields(own, f"{_HEADER} of {component.rstrip('.')}", problems)
    refuse_unmergeable(own, fields)
    bare = {path.removeprefix(component): path for path in paths}
    divisors = {name: alpha_divisor(parts.modules[path]) for name, path in bare.items()}
    ranks = {name: rank for name, rank in divisors.items() if rank is not None}
    by_name = scalings(sorted(bare), ranks, fields, problems)
    return {bare[name]: value for name, value in by_name.items()}


FORMAT: Final[AdapterFormat] = DiffusersFormat()
