"""ai-toolkit, `network.type: dora`: PEFT's factors, and magnitudes of its own.

Source: ai-toolkit of August 2026, `toolkit/models/DoRA.py`, `toolkit/network_mixins.py`. A key is
`transformer.<module>.lora_A.weight`, `.lora_B.weight` or `.magnitude` `[out]`, or begins with
`diffusion_model.`. Alpha is forced to be the rank, and not saved. On the UNets of SD and SDXL it is
not, and the norm there is taken of the update without the scale that the forward applies to it: no
merged weight gives that function, and such files are refused.
"""

from __future__ import annotations

from typing import Final

from dora_convert.core.adapter import Adapter, MagnitudeAxis
from dora_convert.core.bundle import Bundle
from dora_convert.core.image_adapter import (
    image_layout,
    image_modules,
    image_parts,
    no_writer,
    whole_adapter,
)
from dora_convert.core.protocols import AdapterFormat

__all__ = ["FORMAT", "AiToolkitFormat"]

_UNETS: Final = ("unet.", "lora_unet_", "lora_te")


class AiToolkitFormat:
    """One file and no config."""

    title = "ai-toolkit"
    weights = "adapter.safetensors"

    def detect(self, bundle: Bundle) -> bool:
        """Whether magnitudes go by its name for them, beside PEFT's factors."""
        return image_layout(bundle) == "ai_toolkit"

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """See `AdapterFormat.read`."""
        problems: list[str] = []
        parts = image_parts(bundle, problems)
        unets = [path for path in parts.modules if path.startswith(_UNETS)]
        if unets:
            problems.append(
                f"{unets[0]} and {len(unets) - 1} more are of a UNet or its text encoders, where "
                "ai-toolkit takes the norm of another update than the one that it applies"
            )
        ones = dict.fromkeys(parts.modules, 1.0)
        modules = image_modules(parts, ones, axis, problems)
        return whole_adapter("ai_toolkit", bundle, parts, modules, notes=[], problems=problems)

    def write(self, adapter: Adapter) -> Bundle:
        """See `AdapterFormat.write`: never possible."""
        no_writer(self.title, "it has no place for a scale, and nothing but ai-toolkit reads it")


FORMAT: Final[AdapterFormat] = AiToolkitFormat()
