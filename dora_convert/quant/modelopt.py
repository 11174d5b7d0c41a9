"""NVIDIA ModelOpt: e4m3 under one scale or one a row, and NVFP4 under scales for 16 and for all.

Source: nvidia-modelopt (`torch/quantization/qtensor`, `torch/export`), config
`quant_method: modelopt`. Read only: its gain is calibration; nvfp4a16 and fp8_dynamic hold the same
numbers without.
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
from dora_convert.quant._scheme import dense_type, reject, shown, stated

__all__ = ["QUANTIZER", "ModelOpt"]

_GROUP = 16


class ModelOpt:
    """Which of the two a weight is, its type says: a checkpoint may have both."""

    title = "NVIDIA ModelOpt"
    on_host: tuple[str, ...] = ()

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        return stated(config, "modelopt") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`; the dense type is that of the model."""
        problems: list[str] = []
        found = {}
        for name, codes in tensors.items():
            if codes.dtype not in (DType.F8_E4M3, DType.U8) or not name.endswith(".weight"):
                continue
            scale, whole = tensors.get(f"{name}_scale"), tensors.get(f"{name}_scale_2")
            parts = _parts(codes, scale, whole)
            if parts is None:
                given = ", ".join(shown(spec) if spec else "none" for spec in (scale, whole))
                problems.append(f"{name} {shown(codes)}: scales {given} are not known")
                continue
            packed = codes.dtype is DType.U8
            shape = (codes.shape[0], codes.shape[1] * 2) if packed else codes.shape
            dense = TensorSpec(name, dense_type(config), shape)
            found[name] = QuantizedWeight(dense, parts, {"packed": int(packed)})
        reject(self.title, problems)
        return found

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """See `Dequantizer.windows`."""
        rows = Window(start, stop)
        return {
            role: rows if part.shape[0] == weight.rows and role != "whole" else None
            for role, part in weight.parts.items()
        }

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        if not weight.settings["packed"]:
            return parts["codes"].float().mul_(parts["scale"].float().unsqueeze(1))
        values = unpack_fp4(parts["codes"])
        scale = parts["scale"].float() * parts["whole"].float()
        return values.view(stop - start, -1, _GROUP).mul_(scale.unsqueeze(2)).view(values.shape)


def _parts(
    codes: TensorSpec, scale: TensorSpec | None, whole: TensorSpec | None
) -> dict[str, TensorSpec] | None:
    """What a weight is made of, if its scales are such as are known."""
    if scale is None or len(codes.shape) != 2:
        return None
    rows, columns = codes.shape
    if codes.dtype is DType.U8:
        fits = scale.dtype is DType.F8_E4M3 and scale.shape == (rows, columns * 2 // _GROUP)
        if not fits or columns * 2 % _GROUP or whole is None:
            return None
        if whole.dtype is not DType.F32 or whole.numel != 1:
            return None
        return {"codes": codes, "scale": scale, "whole": TensorSpec(whole.name, DType.F32, (1,))}
    if scale.dtype not in (DType.F32, DType.BF16, DType.F16) or scale.numel not in (1, rows):
        return None
    return {"codes": codes, "scale": TensorSpec(scale.name, scale.dtype, (scale.numel,))}


QUANTIZER: Final[Dequantizer] = ModelOpt()
