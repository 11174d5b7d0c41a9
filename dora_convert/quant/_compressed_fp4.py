"""4-bit floats in groups along the row, as compressed-tensors packs them.

Source: compressed-tensors 0.20, `compressors/nvfp4` and `compressors/mxfp4`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._compressed import document, groups
from dora_convert.quant._fp4 import unpack_fp4
from dora_convert.quant._linear import check_matrix
from dora_convert.quant._scheme import SinglePass, dense_type, reject, shown

__all__ = ["PackedFP4"]


class PackedFP4(SinglePass):
    """What is the same whatever the scale is: the packed codes, the names, the config."""

    title: str
    layout_name: str
    group: int
    scale_type: DType
    has_global: bool
    words: Mapping[str, Any]

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        return any(layout == self.layout_name for layout, _ in groups(config))

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`; the dense type is that of the model."""
        problems: list[str] = []
        found = {}
        for stored, packed in tensors.items():
            if not stored.endswith(".weight_packed") or packed.dtype is not DType.U8:
                continue
            name = stored.removesuffix("_packed")
            if len(packed.shape) != 2:
                problems.append(f"{stored} {shown(packed)} is no matrix")
                continue
            shape = (packed.shape[0], packed.shape[1] * 2)
            parts = self._parts(TensorSpec(name, dense_type(config), shape))
            before = len(problems)
            for part in parts.values():
                held = tensors.get(part.name)
                if held is None:
                    problems.append(f"{part.name} is missing")
                elif held.nbytes != part.nbytes or shape[1] % self.group:
                    problems.append(f"{part.name} {shown(held)} does not fit {list(shape)}")
            if len(problems) == before:
                dense = TensorSpec(name, dense_type(config), shape)
                found[name] = QuantizedWeight(dense, parts, {"width": self.group})
        reject(self.title, problems)
        return found

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """See `Dequantizer.windows`."""
        rows = Window(start, stop)
        return {role: None if role == "global" else rows for role in weight.parts}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        values = unpack_fp4(parts["packed"])
        grouped = values.view(stop - start, -1, self.group)
        return grouped.mul_(self.scales(parts).unsqueeze(2)).view(values.shape)

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What every group is multiplied by, float32 `[n, groups]`."""
        raise NotImplementedError

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`."""
        check_matrix(dense, self.title, columns=self.group)
        return QuantizedWeight(dense, self._parts(dense), {"width": self.group})

    def _parts(self, dense: TensorSpec) -> dict[str, TensorSpec]:
        name, (rows, columns) = dense.name, dense.shape
        scales = (rows, columns // self.group)
        parts = {
            "packed": TensorSpec(f"{name}_packed", DType.U8, (rows, columns // 2)),
            "scale": TensorSpec(f"{name}_scale", self.scale_type, scales),
        }
        if self.has_global:
            parts["global"] = TensorSpec(f"{name}_global_scale", DType.F32, (1,))
        return parts

    def config(self, kept_dense: Sequence[str]) -> Json:
        """See `Quantizer.config`."""
        weights = {"num_bits": 4, "type": "float", "group_size": self.group, **self.words}
        return document(self.layout_name, weights, kept_dense)
