"""bitsandbytes NF4 with double quantisation: the peaks are 8-bit codes too.

Source: bitsandbytes, `bnb_4bit_quant_type: nf4`.
"""

from __future__ import annotations

from typing import Final

from dora_convert.core.protocols import Dequantizer
from dora_convert.quant._bitsandbytes import FourBit

__all__ = ["QUANTIZER"]

QUANTIZER: Final[Dequantizer] = FourBit("bitsandbytes NF4, double quantisation", "nf4", nested=True)
