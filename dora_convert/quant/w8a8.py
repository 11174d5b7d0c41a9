"""compressed-tensors W8A8: int8 with one scale a row, activations in int8 as they come.

Source: compressed-tensors `int-quantized`, preset W8A8.
"""

from __future__ import annotations

from typing import Final

import torch

from dora_convert.core.protocols import Dequantizer
from dora_convert.core.tensors import DType
from dora_convert.quant._compressed import Codes, PlainCodes

__all__ = ["QUANTIZER"]

QUANTIZER: Final[Dequantizer] = PlainCodes(
    "compressed-tensors int8, one scale a row (W8A8)",
    "int-quantized",
    DType.I8,
    Codes(-128.0, 127.0, torch.int8),
    {"num_bits": 8, "type": "int"},
)
