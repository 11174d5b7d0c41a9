"""LyCORIS, OneTrainer and whoever else writes image adapters with kohya's names.

Source: LyCORIS 4.1 `modules/{locon,loha,lokr}.py`, OneTrainer `modules/module/LoRAModule.py`. A key
is `lora_unet_down_blocks_0_..._to_q.lora_up.weight`, the module's dots made underscores; OneTrainer
also keeps them, with `lora_A` and `lora_B`. The magnitude is `.dora_scale`, `[out, 1...]` or
`[1, in, 1...]`: LyCORIS wrote the second before 3.2, OneTrainer does by default. Every module has
its `.alpha`. The norm is taken of `W + alpha / rank * D`, whatever the algorithm (LoRA with or
without a Tucker core, LoHa, LoKr).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from dora_convert.core.adapter import Adapter, MagnitudeAxis
from dora_convert.core.bundle import Bundle
from dora_convert.core.image_adapter import (
    ALPHA,
    ImageParts,
    alpha_divisor,
    image_layout,
    image_modules,
    image_parts,
    no_writer,
    whole_adapter,
)
from dora_convert.core.protocols import AdapterFormat

__all__ = ["FORMAT", "KohyaFormat"]

# LyCORIS 3.1: from its release until 3.2 mended it.
_UNTRAINED: Final = (1_727_827_200.0, 1_745_366_400.0)


class KohyaFormat:
    """One file, with whatever the trainer says of itself in the header."""

    title = "LyCORIS, OneTrainer (kohya's names)"
    weights = "adapter.safetensors"

    def detect(self, bundle: Bundle) -> bool:
        """Whether parts go by names that only these trainers use."""
        return image_layout(bundle) == "kohya"

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """See `AdapterFormat.read`."""
        problems: list[str] = []
        parts = image_parts(bundle, problems)
        modules = image_modules(parts, _scalings(parts, bundle, problems), axis, problems)
        notes = _notes(bundle.metadata, problems)
        return whole_adapter("kohya", bundle, parts, modules, notes=notes, problems=problems)

    def write(self, adapter: Adapter) -> Bundle:
        """See `AdapterFormat.write`: never possible."""
        no_writer(self.title, "its alphas are tensors, which an adapter in another layout has not")


def _scalings(parts: ImageParts, bundle: Bundle, problems: list[str]) -> dict[str, float]:
    """`alpha / rank`; a file without alphas means the rank, as every loader has it."""
    found = {}
    for path, tensors in parts.modules.items():
        rank, alpha = alpha_divisor(tensors), tensors.get(ALPHA)
        value = bundle.scalars.get(alpha.stored.name) if alpha is not None else None
        if alpha is not None and value is None:
            problems.append(f"{alpha.stored.name} is not one finite number")
        found[path] = 1.0 if value is None or rank is None else value / rank
    return found


def _notes(metadata: Mapping[str, str], problems: list[str]) -> list[str]:
    """What the trainer's own words say of the magnitudes."""
    if metadata.get("ss_network_module") != "lycoris.kohya":
        return []
    if _arguments(metadata).get("bypass_mode", "").lower() == "true":
        problems.append(
            "it was trained with bypass_mode, in which LyCORIS does not use the magnitudes: leave "
            "them out with --ignore '*.dora_scale'"
        )
    begun = _seconds(metadata.get("ss_training_started_at", ""))
    if _UNTRAINED[0] <= begun < _UNTRAINED[1] and "bypass_mode" not in _arguments(metadata):
        return [
            "it was trained between October 2024 and April 2025, when LyCORIS 3.1 did not use the "
            "magnitudes; if they are the base's own norms, leave them out with --ignore "
            "'*.dora_scale'"
        ]
    return []


def _arguments(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the user passed to the network, as text by name."""
    try:
        found: Any = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


FORMAT: Final[AdapterFormat] = KohyaFormat()
