"""compressed-tensors NVFP4A16: E2M1 in groups of 16 under e4m3 scales under one for the tensor.

Source: compressed-tensors `nvfp4-pack-quantized`, preset NVFP4A16. vLLM fuses q, k, v and gate, up,
which then must have the same tensor scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight
from dora_convert.core.tensors import DType
from dora_convert.quant._compressed_fp4 import PackedFP4
from dora_convert.quant._fp4 import LARGEST_FP4, pack_fp4

__all__ = ["QUANTIZER", "TensorScaledFP4"]

_LARGEST_SCALE = 448.0  # of e4m3
_SMALLEST_SCALE = 0.125  # e4m3's epsilon, which stands in for zero
_FUSED = re.compile(r"\.(?:(?P<qkv>[qkv]_proj)|gate_proj|up_proj)\.weight$")


class TensorScaledFP4(PackedFP4):
    """The largest value of all weights that share a scale must be known first."""

    title = "compressed-tensors NVFP4, weights only (NVFP4A16)"
    layout_name = "nvfp4-pack-quantized"
    group = 16
    scale_type = DType.F8_E4M3
    has_global = True
    words = {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}  # noqa: RUF012
    surveys = two_pass = True

    def fused(self, name: str) -> str | None:
        """See `Quantizer.fused`."""
        found = _FUSED.search(name)
        if found is None:
            return None
        return f"{name[: found.start()]}.{'qkv' if found['qkv'] else 'gate_up'}"

    def survey(self, rows: Tensor) -> Tensor:
        """The largest absolute value, `[1]`, found without a copy of the block."""
        lowest, highest = torch.aminmax(rows)
        return torch.maximum(-lowest, highest).reshape(1)

    def gather(self, surveys: Sequence[Tensor]) -> Tensor:
        """The largest of all, `[1]`."""
        return torch.cat(list(surveys)).amax().reshape(1)

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The scale of the tensor divides."""
        return parts["scale"].float() / parts["global"]

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        whole = self.constants(weight, statistic)["global"]
        grouped = rows.view(rows.shape[0], -1, self.group)
        exact = whole * (grouped.abs().amax(dim=2) / LARGEST_FP4)
        scale = exact.clamp(max=_LARGEST_SCALE).to(torch.float8_e4m3fn).float()
        scale = torch.where(scale == 0, _SMALLEST_SCALE, scale)
        scaled = (grouped / (scale / whole).unsqueeze(2)).clamp_(-LARGEST_FP4, LARGEST_FP4)
        packed = pack_fp4(scaled.view(rows.shape))
        return {"packed": packed, "scale": scale.to(torch.float8_e4m3fn)}

    def constants(
        self, weight: QuantizedWeight, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The scale of the tensor."""
        assert statistic is not None
        peak = statistic.clamp(min=torch.finfo(statistic.dtype).tiny)
        whole = torch.nan_to_num(_LARGEST_SCALE * LARGEST_FP4 / peak, posinf=1.0)
        return {"global": whole.float()}


QUANTIZER: Final[Dequantizer] = TensorScaledFP4()
