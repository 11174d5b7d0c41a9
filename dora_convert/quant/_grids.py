"""Scales on a grid over a matrix: one for each tile of rows x columns."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_convert.core.quantized import Window
from dora_convert.core.tensors import DType

__all__ = ["TORCH", "expand", "powers_of_two", "tile_peaks", "tile_window"]

# The element types of scales and of dense weights.
TORCH = {
    DType.F32: torch.float32,
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F64: torch.float64,
}


def tile_window(start: int, stop: int, height: int) -> Window:
    """The rows of the grid over rows `start:stop` of the matrix."""
    return Window(start // height, -(-stop // height))


def expand(grid: Tensor, start: int, stop: int, height: int, width: int, columns: int) -> Tensor:
    """`[stop - start, columns]`: every element's entry; `grid` begins at the tile of `start`.

    Tiles at the far edges may be cut.
    """
    wide = grid.repeat_interleave(width, dim=1)[:, :columns] if width > 1 else grid
    if height == 1:
        return wide
    tiles = torch.arange(start, stop, device=grid.device) // height - start // height
    return wide[tiles]


def powers_of_two(exponents: Tensor) -> Tensor:
    """Float32 of bare uint8 exponents with 127 added (E8M0)."""
    return exponents.view(torch.float8_e8m0fnu).float()


def tile_peaks(rows: Tensor, height: int, width: int) -> Tensor:
    """The largest absolute value of every tile of `rows [n, in]`; cut tiles count as they are."""
    down, right = -rows.shape[0] % height, -rows.shape[1] % width
    if down or right:
        rows = torch.nn.functional.pad(rows, (0, right, 0, down))
    n, columns = rows.shape
    tiles = rows.view(n // height, height, columns // width, width)
    # Not of the absolute values, which would be a copy.
    return torch.maximum(tiles.amax(dim=(1, 3)), -tiles.amin(dim=(1, 3)))
