"""bitsandbytes FP4: 4-bit codes with a float32 peak for each 64 elements.

Source: bitsandbytes, `bnb_4bit_quant_type: fp4`.
"""

from __future__ import annotations

from typing import Final

from dora_convert.core.protocols import Dequantizer
from dora_convert.quant._bitsandbytes import FourBit

__all__ = ["QUANTIZER"]

QUANTIZER: Final[Dequantizer] = FourBit("bitsandbytes FP4", "fp4", nested=False)
