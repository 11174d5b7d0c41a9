"""compressed-tensors FP8: e4m3 with one scale a row, activations scaled as they come.

Source: compressed-tensors `float-quantized`, preset FP8_DYNAMIC.
"""

from __future__ import annotations

from typing import Final

import torch

from dora_convert.core.protocols import Dequantizer
from dora_convert.core.tensors import DType
from dora_convert.quant._compressed import Codes, PlainCodes

__all__ = ["QUANTIZER"]

QUANTIZER: Final[Dequantizer] = PlainCodes(
    "compressed-tensors FP8, one scale a row (FP8_DYNAMIC)",
    "float-quantized",
    DType.F8_E4M3,
    Codes(-448.0, 448.0, torch.float8_e4m3fn),
    {"num_bits": 8, "type": "float"},
)
