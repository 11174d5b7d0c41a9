"""The algebra of arXiv 2402.09353, equation 5: `W' = m * V / ||V||`; `maths.deltas` adds up V.

All functions work on a block of rows of the stored `[out, in]` weight, in the block's own element
type, in place, so that a caller can reuse one buffer for a whole model. None waits for a device:
what is counted there stays there until somebody asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "RowFaults",
    "channel_sums",
    "column_factors",
    "overflows",
    "per_column",
    "scale_by",
    "scale_rows",
    "square_sums",
]


@dataclass(frozen=True, slots=True)
class RowFaults:
    """Results that are undefined, counted.

    `zero`: rows (columns for axis IN) of norm 0 with a magnitude that is not 0. `nonfinite`: rows
    whose norm is NaN or infinite. `overflow`: elements too large for the output's type. Counts of
    a device's blocks are tensors on it, which `settled` waits for.
    """

    zero: int | Tensor = 0
    nonfinite: int | Tensor = 0
    overflow: int | Tensor = 0

    def __add__(self, other: RowFaults) -> RowFaults:
        return RowFaults(
            self.zero + other.zero,
            self.nonfinite + other.nonfinite,
            self.overflow + other.overflow,
        )

    def settled(self) -> RowFaults:
        """The same as plain numbers."""
        return RowFaults(int(self.zero), int(self.nonfinite), int(self.overflow))

    def __bool__(self) -> bool:
        return bool(self.zero or self.nonfinite or self.overflow)


_NONE = RowFaults()


def scale_rows(direction: Tensor, magnitude: Tensor) -> RowFaults:
    """Axis OUT: `direction [n, in]` becomes `magnitude [n] * direction / ||direction||`.

    A row of norm 0 becomes 0; where its magnitude is not 0 it is counted as a fault.
    """
    norm = torch.linalg.vector_norm(direction, dim=1)
    factor, faults = _factors(magnitude, norm)
    direction.mul_(factor.unsqueeze(1))
    return faults


def scale_by(direction: Tensor, factor: Tensor) -> RowFaults:
    """`direction [n, in]` times a factor `m / ||V||` that is known, `[n, 1]` or `[in]`."""
    direction.mul_(factor)
    # A look at the sum spares the CPU a pass; a device would have to be waited for.
    if _is_host(direction) and bool(torch.isfinite(direction.sum(dtype=torch.float64))):
        return _NONE
    return RowFaults(nonfinite=_count(~torch.isfinite(direction).all(dim=1)))


def overflows(exact: Tensor, narrow: Tensor) -> RowFaults:
    """Finite elements that became infinite when they were narrowed to float16."""
    if narrow.dtype is not torch.float16:
        return _NONE
    if _is_host(narrow) and bool(torch.isfinite(narrow).all()):
        return _NONE
    return RowFaults(overflow=_count(torch.isfinite(exact) & ~torch.isfinite(narrow)))


def square_sums(direction: Tensor) -> Tensor:
    """Axis IN, first pass: the block's part of every column's squared norm, float64 `[in]`.

    `direction` is destroyed.
    """
    return direction.square_().sum(dim=0).double()


def column_factors(magnitude: Tensor, squares: Tensor) -> tuple[Tensor, RowFaults]:
    """Axis IN, second pass: what each column is multiplied by, `magnitude / sqrt(squares)`.

    A convolution's magnitude has an entry for each input channel, whose norm runs over the kernel
    too. The columns of a channel lie side by side.
    """
    lengths = channel_sums(squares, len(magnitude)).sqrt()
    factor, faults = _factors(magnitude.double(), lengths)
    return per_column(factor, len(squares)), faults


def channel_sums(columns: Tensor, channels: int) -> Tensor:
    """Numbers of columns `[..., in * k]`, summed over each channel's: `[..., in]`."""
    each = columns.shape[-1] // max(channels, 1)
    return columns.view(*columns.shape[:-1], channels, each).sum(dim=-1)


def per_column(channels: Tensor, columns: int) -> Tensor:
    """Numbers of channels `[in]` for each of their columns, `[in * k]`."""
    return channels.repeat_interleave(columns // max(len(channels), 1))


def _factors(magnitude: Tensor, norm: Tensor) -> tuple[Tensor, RowFaults]:
    factor = magnitude / norm
    if _is_host(norm):
        low, high = torch.aminmax(norm)
        # A NaN makes both comparisons false.
        if low > 0 and high < torch.inf:
            return factor, _NONE
    zero = norm == 0
    factor = torch.where(zero, torch.zeros_like(factor), factor)
    return factor, RowFaults(
        zero=_count(zero & (magnitude != 0)),
        nonfinite=_count(~torch.isfinite(norm)),
    )


def _count(mask: Tensor) -> int | Tensor:
    total = mask.sum()
    return int(total) if _is_host(mask) else total


def _is_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
