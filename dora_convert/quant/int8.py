"""bitsandbytes LLM.int8(): int8 with the peak of each row in `SCB`.

Source: bitsandbytes 0.50, `int8_vectorwise_quant`, as transformers saves it. The library converts
a weight to float16 first.
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
from dora_convert.quant._bitsandbytes import document
from dora_convert.quant._grids import TORCH
from dora_convert.quant._linear import check_matrix, module_of
from dora_convert.quant._scheme import SinglePass, reject, shown, stated

__all__ = ["QUANTIZER", "RowInt8"]

_STEP = 1 / 127


class RowInt8(SinglePass):
    """The peak stands for 127."""

    title = "bitsandbytes int8 (LLM.int8())"
    returns = DType.F32

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        words = stated(config, "bitsandbytes")
        return words is not None and bool(words.get("load_in_8bit", words.get("_load_in_8bit")))

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`."""
        problems: list[str] = []
        found = {}
        for name, spec in tensors.items():
            if spec.dtype is not DType.I8 or not name.endswith(".weight"):
                continue
            peaks = tensors.get(f"{module_of(name)}.SCB")
            if peaks is None:
                problems.append(f"{module_of(name)}.SCB is missing")
            elif len(spec.shape) != 2 or peaks.dtype is not DType.F32:
                problems.append(f"{name} {shown(spec)}: SCB {shown(peaks)} does not fit")
            elif peaks.numel != spec.shape[0]:
                problems.append(f"{name} {shown(spec)}: SCB has {peaks.numel} entries")
            else:
                # The library's dequantisation returns float32.
                dense = TensorSpec(name, DType.F32, spec.shape)
                peaks = TensorSpec(peaks.name, peaks.dtype, spec.shape[:1])
                found[name] = QuantizedWeight(dense, {"weight": spec, "peaks": peaks})
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`."""
        return {"weight": Window(start, stop), "peaks": Window(start, stop)}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        return parts["weight"].float().mul_(parts["peaks"].unsqueeze(1)).mul_(_STEP)

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`."""
        check_matrix(dense, self.title)
        module = module_of(dense.name)
        parts = {
            "weight": TensorSpec(dense.name, DType.I8, dense.shape),
            "peaks": TensorSpec(f"{module}.SCB", DType.F32, dense.shape[:1]),
            "format": TensorSpec(f"{module}.weight_format", DType.U8, ()),
        }
        return QuantizedWeight(dense, parts)

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        if rows.dtype is TORCH[weight.dense.dtype]:
            rows = rows.half()
        rows = rows.float()
        peaks = rows.abs().amax(dim=1)
        factor = torch.where(peaks > 0, 127.0 / peaks, 0.0)
        codes = (rows * factor.unsqueeze(1)).round_().to(torch.int8)
        return {"weight": codes, "peaks": peaks}

    def constants(
        self, weight: QuantizedWeight, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The mark of the row-major layout."""
        return {"format": torch.tensor(0, dtype=torch.uint8)}

    def config(self, kept_dense: Sequence[str]) -> Json:
        """See `Quantizer.config`."""
        return document(kept_dense, load_in_4bit=False)


QUANTIZER: Final[Dequantizer] = RowInt8()
