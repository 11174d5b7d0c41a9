"""Block FP8: e4m3 with a float32 scale for each 128 x 128 tile, of DeepSeek-V3 and Qwen3-FP8.

Source: transformers `integrations/finegrained_fp8.py`; config `quant_method: fp8`. The scale is
called `weight_scale_inv` and is multiplied by. Tiles at the edges may be cut.
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
from dora_convert.quant._grids import expand, powers_of_two, tile_peaks, tile_window
from dora_convert.quant._linear import check_matrix
from dora_convert.quant._scheme import SinglePass, dense_type, reject, shown, stated

__all__ = ["QUANTIZER", "BlockFP8"]

_TILE = 128
_LARGEST = 448.0  # of e4m3
_SCALES = (DType.F32, DType.BF16, DType.F16, DType.F8_E8M0, DType.U8)


class BlockFP8(SinglePass):
    """Reads any tile size and one scale for the tensor; writes 128 x 128."""

    title = "block FP8 128x128 (DeepSeek, Qwen3-FP8)"

    def detect(self, config: Json) -> bool:
        """Whether `quant_method` is `fp8`."""
        return stated(config, "fp8") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`."""
        problems: list[str] = []
        tile = _tile(config, problems)
        dense = dense_type(config)
        found = {}
        for name, spec in tensors.items():
            if spec.dtype is not DType.F8_E4M3 or not name.endswith(".weight"):
                continue
            scale = tensors.get(f"{name}_scale_inv")
            if scale is None:
                problems.append(f"{name}: weight_scale_inv is missing")
            elif len(spec.shape) != 2 or scale.dtype not in _SCALES:
                problems.append(f"{name}: {shown(spec)} with a scale {shown(scale)} is not known")
            else:
                height, width = tile or spec.shape
                grid = (-(-spec.shape[0] // height), -(-spec.shape[1] // width))
                if scale.numel != grid[0] * grid[1] or (tile and scale.shape != grid):
                    problems.append(
                        f"{name}: {list(spec.shape)} in tiles of {height} x {width} needs "
                        f"{list(grid)} scales, the file has {list(scale.shape)}"
                    )
                    continue
                found[name] = QuantizedWeight(
                    TensorSpec(name, dense, spec.shape),
                    {"weight": spec, "scale": TensorSpec(scale.name, scale.dtype, grid)},
                    {"height": height, "width": width},
                )
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`."""
        scale = tile_window(start, stop, weight.settings["height"])
        return {"weight": Window(start, stop), "scale": scale}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        grid = parts["scale"]
        if grid.dtype is torch.uint8:  # a bare exponent
            grid = powers_of_two(grid)
        height, width = weight.settings["height"], weight.settings["width"]
        scale = expand(grid.float(), start, stop, height, width, weight.columns)
        return parts["weight"].float().mul_(scale)

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`."""
        check_matrix(dense, self.title)
        grid = (-(-dense.shape[0] // _TILE), -(-dense.shape[1] // _TILE))
        parts = {
            "weight": TensorSpec(dense.name, DType.F8_E4M3, dense.shape),
            "scale": TensorSpec(f"{dense.name}_scale_inv", DType.F32, grid),
        }
        return QuantizedWeight(dense, parts, {"height": _TILE, "width": _TILE})

    def row_multiple(self, weight: QuantizedWeight) -> int:
        """See `Quantizer.row_multiple`."""
        return weight.settings["height"]

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        rows = rows.float()
        peaks = tile_peaks(rows, _TILE, _TILE)
        # Through the reciprocal, as transformers does: peaks / 448 differs in some last bits.
        factor = torch.where(peaks > 0, _LARGEST / peaks, 1.0)
        scaled = rows * expand(factor, 0, rows.shape[0], _TILE, _TILE, rows.shape[1])
        codes = scaled.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return {"weight": codes, "scale": 1.0 / factor}

    def config(self, kept_dense: Sequence[str]) -> Json:
        """Read by transformers and vLLM."""
        words = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_TILE, _TILE],
            "modules_to_not_convert": sorted(kept_dense),
        }
        return {"quantization_config": words}


def _tile(config: Json, problems: list[str]) -> tuple[int, int] | None:
    size = (stated(config, "fp8") or {}).get("weight_block_size")
    if size is None:
        return None
    if (
        isinstance(size, list)
        and len(size) == 2
        and all(type(n) is int and 0 < n <= 2**20 for n in size)
    ):
        return size[0], size[1]
    problems.append(f"config.json: 'weight_block_size' must be two whole numbers, not {size!r:.60}")
    return None


QUANTIZER: Final[Dequantizer] = BlockFP8()
