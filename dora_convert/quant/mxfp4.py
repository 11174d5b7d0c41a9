"""gpt-oss MXFP4: the experts of a layer in one tensor, E2M1 in groups of 32 under powers of two.

Source: transformers `integrations/mxfp4.py`; config `quant_method: mxfp4`. A group's exponent is
that of its peak less two, rounded down (OCP MX 1.0, 6.3). No DoRA adapter sits on these experts: to
write the format is, above all, to let a base's own bytes pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError
from dora_convert.quant._fp4 import LARGEST_FP4, pack_fp4, unpack_fp4
from dora_convert.quant._grids import powers_of_two
from dora_convert.quant._scheme import SinglePass, dense_type, reject, shown, stated

__all__ = ["QUANTIZER", "ExpertsMXFP4"]

_GROUP = 32
_LARGEST_EXPONENT = 2  # of E2M1
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


class ExpertsMXFP4(SinglePass):
    """A row is one expert: the transpose of what is stored, as a 16-bit checkpoint has it.

    Dense is `[experts, in * out]` for `[experts, in, out]`.
    """

    title = "gpt-oss MXFP4 experts"

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        return stated(config, "mxfp4") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`."""
        problems: list[str] = []
        found = {}
        for stored, blocks in tensors.items():
            if not stored.endswith("_blocks") or blocks.dtype is not DType.U8:
                continue
            name = stored.removesuffix("_blocks")
            scales = tensors.get(f"{name}_scales")
            if scales is None:
                problems.append(f"{name}_scales is missing")
            elif (
                len(blocks.shape) != 4
                or blocks.shape[3] != _GROUP // 2
                or scales.shape != blocks.shape[:3]
                or scales.dtype is not DType.U8
            ):
                problems.append(f"{stored} {shown(blocks)}: scales {shown(scales)} do not fit")
            else:
                experts, out, groups, _ = blocks.shape
                shape = (experts, groups * _GROUP, out)
                found[name] = self.layout(TensorSpec(name, dense_type(config), shape))
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`."""
        return {"blocks": Window(start, stop), "scales": Window(start, stop)}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        _, inner, out = weight.shape
        values = unpack_fp4(parts["blocks"].reshape(-1, _GROUP // 2))
        values *= powers_of_two(parts["scales"]).reshape(-1, 1)
        return values.view(stop - start, out, inner).transpose(1, 2).reshape(stop - start, -1)

    def takes(self, dense: TensorSpec) -> bool:
        """The experts alone."""
        return len(dense.shape) == 3 and dense.dtype.is_weight and dense.name.endswith(_EXPERTS)

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`; `dense` is `[experts, in, out]`."""
        if len(dense.shape) != 3 or not dense.numel or dense.shape[1] % _GROUP:
            raise InputError(
                f"{self.title} are [experts, in, out], and in is a multiple of {_GROUP}",
                where=f"{dense.name} {list(dense.shape)}",
                hint="Keep it dense with --keep-dense, or choose another scheme.",
            )
        experts, inner, out = dense.shape
        groups = (experts, out, inner // _GROUP)
        parts = {
            "blocks": TensorSpec(f"{dense.name}_blocks", DType.U8, (*groups, _GROUP // 2)),
            "scales": TensorSpec(f"{dense.name}_scales", DType.U8, groups),
        }
        matrix = TensorSpec(dense.name, dense.dtype, (experts, inner * out))
        return QuantizedWeight(matrix, parts, shape=dense.shape)

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        _, inner, out = weight.shape
        turned = rows.float().view(len(rows), inner, out).transpose(1, 2)
        grouped = turned.reshape(-1, _GROUP)
        exponents = (grouped.abs().amax(dim=1).view(torch.int32) >> 23) - _LARGEST_EXPONENT
        scales = exponents.clamp_(0, 254).to(torch.uint8)
        scaled = grouped / powers_of_two(scales).unsqueeze(1)
        blocks = pack_fp4(scaled.clamp_(-LARGEST_FP4, LARGEST_FP4))
        shape = (len(rows), out, inner // _GROUP)
        return {"blocks": blocks.view(*shape, -1), "scales": scales.view(shape)}

    def config(self, kept_dense: Sequence[str]) -> Json:
        """As transformers writes it."""
        words = {"quant_method": "mxfp4", "modules_to_not_convert": sorted(kept_dense)}
        return {"quantization_config": words}


QUANTIZER: Final[Dequantizer] = ExpertsMXFP4()
