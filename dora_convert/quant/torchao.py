"""torchao: int8 and e4m3 codes with a scale for each row, each group of a row, or the tensor.

Source: torchao 0.18 (`Int8Tensor`, `Float8Tensor`, `IntxUnpackedToInt8Tensor`), as transformers
saves them; config `quant_method: torchao`. Read only: its gain lies in kernels of its own. Codes
that are packed for one kind of processor are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._grids import TORCH, expand, tile_window
from dora_convert.quant._scheme import dense_type, reject, shown, stated

__all__ = ["QUANTIZER", "PlainTorchao"]

_CODES = "_weight_qdata"


class PlainTorchao:
    """The parts of a weight lie beside each other under names of the module."""

    title = "torchao"
    on_host: tuple[str, ...] = ()

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        return stated(config, "torchao") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`; the dense type is that of the model."""
        problems: list[str] = []
        found = {}
        for stored, codes in tensors.items():
            module, _, leaf = stored.rpartition(".")
            if leaf != _CODES:
                continue
            scale = tensors.get(f"{module}._weight_scale")
            zero = tensors.get(f"{module}._weight_zero_point")
            if scale is None:
                problems.append(f"{module}._weight_scale is missing")
                continue
            tile = _tile(codes, scale)
            if tile is None or (zero is not None and zero.numel != scale.numel):
                problems.append(
                    f"{module}: {_CODES} {shown(codes)}, scale {shown(scale)}"
                    f"{f', zero point {shown(zero)}' if zero else ''} are not known"
                )
                continue
            grid = (codes.shape[0] // tile[0], codes.shape[1] // tile[1])
            parts = {"codes": codes, "scale": TensorSpec(scale.name, scale.dtype, grid)}
            if zero is not None:
                parts["zero"] = TensorSpec(zero.name, zero.dtype, grid)
            dense = TensorSpec(f"{module}.weight", dense_type(config), codes.shape)
            found[dense.name] = QuantizedWeight(dense, parts, {"height": tile[0], "width": tile[1]})
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`."""
        tiles = tile_window(start, stop, weight.settings["height"])
        return {role: Window(start, stop) if role == "codes" else tiles for role in weight.parts}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`; rounded, as PEFT has it where it trains on such a base."""
        tile = (weight.settings["height"], weight.settings["width"])
        codes = parts["codes"].float()
        if "zero" in parts:
            codes -= expand(parts["zero"].float(), start, stop, *tile, weight.columns)
        codes *= expand(parts["scale"].float(), start, stop, *tile, weight.columns)
        return codes.to(TORCH[weight.dense.dtype]).float()


def _tile(codes: TensorSpec, scale: TensorSpec) -> tuple[int, int] | None:
    """Rows and columns under one scale."""
    plain = codes.dtype in (DType.I8, DType.F8_E4M3) and scale.dtype in TORCH
    if not plain or len(codes.shape) != 2 or not codes.numel:
        return None
    rows, columns = codes.shape
    if scale.numel == 1:
        return rows, columns
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1]:
        return None
    return None if columns % scale.shape[1] else (1, columns // scale.shape[1])


QUANTIZER: Final[Dequantizer] = PlainTorchao()
