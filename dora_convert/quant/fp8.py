"""Block FP8: e4m3 with a float32 scale for each 128 x 128 tile, of DeepSeek-V3 and Qwen3-FP8.

Source: transformers `integrations/finegrained_fp8.py`; config `quant_method: fp8`. The scale is
called `weight_scale_inv` and is multiplied by. Tiles at the edges may be cut. Experts in one
tensor, `[experts, out, in]`, have a grid each.
"""

from __future__ import annotations

import math
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
_PANEL = 16  # tiles
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
            scale = tensors.get(f"{name}_scale_inv")
            is_weight = name.endswith(".weight") or (scale is not None and len(spec.shape) == 3)
            if spec.dtype is not DType.F8_E4M3 or not is_weight:
                continue
            if scale is None:
                problems.append(f"{name}: weight_scale_inv is missing")
            elif len(spec.shape) not in (2, 3) or scale.dtype not in _SCALES:
                problems.append(f"{name}: {shown(spec)} with a scale {shown(scale)} is not known")
            else:
                height, width = tile or spec.shape[-2:]
                grid = _grid(spec.shape, height, width)
                if scale.numel != math.prod(grid) or (tile and scale.shape != grid):
                    problems.append(
                        f"{name}: {list(spec.shape)} in tiles of {height} x {width} needs "
                        f"{list(grid)} scales, the file has {list(scale.shape)}"
                    )
                    continue
                found[name] = _weight(
                    TensorSpec(name, dense, spec.shape), scale.dtype, height, width
                )
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`."""
        rows = Window(start, stop)
        if weight.shape:
            return {"weight": rows, "scale": rows}
        return {"weight": rows, "scale": tile_window(start, stop, weight.settings["height"])}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        codes, grid = parts["weight"], parts["scale"]
        if grid.dtype is torch.uint8:  # a bare exponent
            grid = powers_of_two(grid)
        height, width = weight.settings["height"], weight.settings["width"]
        if not weight.shape:
            values, step = codes.float(), _PANEL * width
            for first in range(0, weight.columns, step):
                panel, part = values[:, first : first + step], grid[:, first // width :].float()
                panel.mul_(expand(part, start, stop, height, width, panel.shape[1]))
            return values
        _, out, inner = weight.shape
        spread = [expand(each.float(), 0, out, height, width, inner) for each in grid]
        return codes.float().mul_(torch.stack(spread)).view(stop - start, -1)

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`; the experts of a base that has them so may be `[n, out, in]`."""
        if len(dense.shape) != 3 or dense.name.endswith(".weight") or not dense.numel:
            check_matrix(dense, self.title)
        return _weight(dense, DType.F32, _TILE, _TILE)

    def row_multiple(self, weight: QuantizedWeight) -> int:
        """See `Quantizer.row_multiple`."""
        return 1 if weight.shape else weight.settings["height"]

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        if not weight.shape:
            codes, scale = _quantised(rows.float())
            return {"weight": codes, "scale": scale}
        experts = rows.float().view(len(rows), *weight.shape[1:])
        made = [_quantised(expert) for expert in experts]
        return {
            "weight": torch.stack([codes for codes, _ in made]),
            "scale": torch.stack([scale for _, scale in made]),
        }

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


def _grid(shape: tuple[int, ...], height: int, width: int) -> tuple[int, ...]:
    *experts, out, inner = shape
    return (*experts, -(-out // height), -(-inner // width))


def _weight(dense: TensorSpec, scale: DType, height: int, width: int) -> QuantizedWeight:
    """A matrix, or the experts of a layer in one tensor; a row is one expert then."""
    parts = {
        "weight": TensorSpec(dense.name, DType.F8_E4M3, dense.shape),
        "scale": TensorSpec(f"{dense.name}_scale_inv", scale, _grid(dense.shape, height, width)),
    }
    settings = {"height": height, "width": width}
    if len(dense.shape) == 2:
        return QuantizedWeight(dense, parts, settings)
    experts = dense.shape[0]
    matrix = TensorSpec(dense.name, dense.dtype, (experts, dense.numel // experts))
    return QuantizedWeight(matrix, parts, settings, dense.shape)


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    peaks = tile_peaks(rows, _TILE, _TILE)
    # Through the reciprocal, as transformers does: peaks / 448 differs in some last bits.
    factor = torch.where(peaks > 0, _LARGEST / peaks, 1.0)
    codes = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    # A row of tiles may be large: a few tiles at a time.
    for first in range(0, rows.shape[1], _PANEL * _TILE):
        columns = slice(first, first + _PANEL * _TILE)
        panel, grid = rows[:, columns], factor[:, first // _TILE :]
        scaled = panel * expand(grid, 0, len(panel), _TILE, _TILE, panel.shape[1])
        codes[:, columns] = scaled.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return codes, 1.0 / factor


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
