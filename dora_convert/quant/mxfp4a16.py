"""compressed-tensors MXFP4A16: E2M1 in groups of 32 under a power of two.

Source: compressed-tensors `mxfp4-pack-quantized`, preset MXFP4A16. A group's exponent is rounded to
the nearest, where OCP's own recipe rounds down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight
from dora_convert.core.tensors import DType
from dora_convert.quant._compressed_fp4 import PackedFP4
from dora_convert.quant._fp4 import LARGEST_FP4, pack_fp4
from dora_convert.quant._grids import powers_of_two

__all__ = ["QUANTIZER", "PowerScaledFP4"]

# In the bits of a float32: half a step of E2M1's one bit of mantissa, and its largest exponent.
_HALF_STEP = 1 << 21
_EXPONENT = 2


class PowerScaledFP4(PackedFP4):
    """The scale is stored as an exponent with 127 added."""

    title = "compressed-tensors MXFP4, weights only (MXFP4A16)"
    layout_name = "mxfp4-pack-quantized"
    group = 32
    scale_type = DType.U8
    has_global = False
    words = {"strategy": "group", "scale_dtype": "torch.uint8"}  # noqa: RUF012

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Two to the stored exponent."""
        return powers_of_two(parts["scale"])

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        grouped = rows.view(rows.shape[0], -1, self.group).float()
        peaks = grouped.abs().amax(dim=2)
        exponents = ((peaks.view(torch.int32) + _HALF_STEP) >> 23) - _EXPONENT
        scale = exponents.clamp_(0, 254).to(torch.uint8)
        scaled = grouped / powers_of_two(scale).unsqueeze(2)
        packed = pack_fp4(scaled.clamp_(-LARGEST_FP4, LARGEST_FP4).view(rows.shape))
        return {"packed": packed, "scale": scale}


QUANTIZER: Final[Dequantizer] = PowerScaledFP4()
