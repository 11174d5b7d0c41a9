"""compressed-tensors W4A16: 4-bit integers in groups of 128, activations in 16 bits.

Source: compressed-tensors `pack-quantized`, presets W4A16 and, for reading, W4A16_ASYM.
"""

from __future__ import annotations

from typing import Final

from dora_convert.core.protocols import Dequantizer
from dora_convert.quant._packed import PackedCodes

__all__ = ["QUANTIZER"]

QUANTIZER: Final[Dequantizer] = PackedCodes("compressed-tensors int4, groups of 128 (W4A16)", 4)
