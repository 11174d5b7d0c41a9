"""bitsandbytes FP4 with double quantisation: the peaks are 8-bit codes too.

Source: bitsandbytes, `bnb_4bit_quant_type: fp4`.
"""

from __future__ import annotations

from typing import Final

from dora_convert.core.protocols import Dequantizer
from dora_convert.quant._bitsandbytes import FourBit

__all__ = ["QUANTIZER"]

QUANTIZER: Final[Dequantizer] = FourBit("bitsandbytes FP4, double quantisation", "fp4", nested=True)
