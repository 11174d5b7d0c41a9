"""gpt-oss MXFP4: the experts of a layer in one tensor, E2M1 in groups of 32 under powers of two.

Source: transformers `integrations/mxfp4.py`; config `quant_method: mxfp4`. Read only: no DoRA
adapter sits on these experts, which pass through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._fp4 import unpack_fp4
from dora_convert.quant._grids import powers_of_two
from dora_convert.quant._scheme import dense_type, reject, shown, stated

__all__ = ["QUANTIZER", "ExpertsMXFP4"]

_GROUP = 32


class ExpertsMXFP4:
    """Dense is `[experts * out, in]`: every expert's rows in turn.

    A 16-bit gpt-oss checkpoint holds the transpose of each expert, `[experts, in, out]`.
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
                experts, out, groups, half = blocks.shape
                rows = experts * out
                dense = TensorSpec(name, dense_type(config), (rows, groups * _GROUP))
                parts = {
                    "blocks": TensorSpec(stored, DType.U8, (rows, groups * half)),
                    "scales": TensorSpec(scales.name, DType.U8, (rows, groups)),
                }
                found[name] = QuantizedWeight(dense, parts, {"experts": experts})
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`."""
        return {"blocks": Window(start, stop), "scales": Window(start, stop)}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        values = unpack_fp4(parts["blocks"])
        grouped = values.view(stop - start, -1, _GROUP)
        return grouped.mul_(powers_of_two(parts["scales"]).unsqueeze(2)).view(values.shape)


QUANTIZER: Final[Dequantizer] = ExpertsMXFP4()
