"""The effective update of one module, `T = W' - W`, as an operator over streamed row blocks.

With `D = scaling * up @ down` and `c = m / ||V||`, T is `diag(c) D + diag(c - 1) W` for axis OUT,
`D diag(c) + W diag(c - 1)` for axis IN. It has full rank in general and is never formed: a product
needs W, read block by block, the factors, and c.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dora_convert.core.adapter import MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Piece
from dora_convert.core.tensors import TensorRef
from dora_convert.execution.kernels import Operands, figure_dtype
from dora_convert.execution.lanes import BLOCK_BYTES, Buffers
from dora_convert.maths.dora import RowFaults, column_factors, square_sums
from dora_convert.storage.reader import Reader, RowBlocks

__all__ = ["Update", "open_update"]


@dataclass(slots=True)
class Update:
    """See the module. `by_magnitude` is ||T - D||²: what D alone would miss.

    `row_squares` `[out]` and `column_squares` `[in]` are the squared norms of T's rows and columns.
    """

    base: TensorRef
    piece: Piece
    operands: Operands
    buffers: Buffers
    blocks: RowBlocks
    dtype: torch.dtype
    by_row: bool
    factor: Tensor  # c, [out] or [in]
    excess: Tensor  # c - 1, taken in float64
    by_magnitude: float = 0.0
    row_squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    column_squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    faults: RowFaults = field(default_factory=RowFaults)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)` of the stored weight's part that the module covers."""
        return self.piece.stop - self.piece.start, self.base.spec.shape[1]

    @property
    def square(self) -> float:
        """||T||²."""
        return float(self.row_squares.sum())

    def times(self, x: Tensor) -> Tensor:
        """`T @ x`."""
        x = x.to(self.dtype)
        inner = x if self.by_row else self.excess.unsqueeze(1) * x
        result = torch.zeros((self.shape[0], x.shape[1]), dtype=self.dtype)
        for start, stop, weight in self._scaled_rows():
            torch.matmul(weight, inner, out=result[start:stop])
        if self.by_row:
            result *= self.excess.unsqueeze(1)
        if self.operands.up is not None and self.operands.down is not None:
            scaled = x if self.by_row else self.factor.unsqueeze(1) * x
            update = self.operands.up @ (self.operands.down @ scaled)
            result += self.factor.unsqueeze(1) * update if self.by_row else update
        return result

    def transposed_times(self, y: Tensor) -> Tensor:
        """`T.T @ y`."""
        y = y.to(self.dtype)
        outer = self.excess.unsqueeze(1) * y if self.by_row else y
        result = torch.zeros((self.shape[1], y.shape[1]), dtype=self.dtype)
        for start, stop, weight in self._scaled_rows():
            result.addmm_(weight.T, outer[start:stop])
        if not self.by_row:
            result *= self.excess.unsqueeze(1)
        if self.operands.up is not None and self.operands.down is not None:
            scaled = self.factor.unsqueeze(1) * y if self.by_row else y
            update = self.operands.down.T @ (self.operands.up.T @ scaled)
            result += update if self.by_row else self.factor.unsqueeze(1) * update
        return result

    def _scaled_rows(self) -> Iterator[tuple[int, int, Tensor]]:
        # Of a plain LoRA's update W is no part, not even where W is NaN.
        return iter(()) if self.operands.magnitude is None else self._rows()

    def _rows(self) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of W in the working type, numbered from the module's first row."""
        rows, columns = self.shape
        for start, stop in self.blocks.spans(0, rows, BLOCK_BYTES):
            raw = self.buffers.take("raw", self.base.spec.row_bytes * (stop - start))
            work, _ = self.buffers.matrix("work", stop - start, columns, self.dtype)
            first = self.piece.start
            work.copy_(self.blocks.read(first + start, first + stop, raw))
            yield start, stop, work

    def directions(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Blocks of V and of D."""
        for start, stop, work in self._rows():
            update, _ = self.buffers.matrix("update", stop - start, work.shape[1], self.dtype)
            if self.operands.up is not None and self.operands.down is not None:
                torch.matmul(self.operands.up[start:stop], self.operands.down, out=update)
            else:
                update.zero_()
            yield start, stop, work.add_(update), update

    def squares(self, block: Tensor) -> Tensor:
        """Every element's square in float64, until it is asked for again."""
        rows, columns = block.shape
        wide, _ = self.buffers.matrix("squares", rows, columns, torch.float64)
        return wide.copy_(block).square_()


@contextmanager
def open_update(
    base: TensorRef, piece: Piece, reader: Reader, buffers: Buffers
) -> Iterator[Update]:
    """Read the factors and, where there is a magnitude, the weight twice: for c, and for norms."""
    dtype = figure_dtype(base.spec.dtype)
    operands = Operands.load(reader, piece, piece.start, piece.stop, dtype)
    by_row = piece.module.axis is MagnitudeAxis.OUT
    length = piece.stop - piece.start if by_row else base.spec.shape[1]
    ones = torch.ones(length, dtype=dtype)
    with reader.rows(base) as blocks:
        update = Update(
            base, piece, operands, buffers, blocks, dtype, by_row, ones, torch.zeros_like(ones)
        )
        update.row_squares = torch.zeros(update.shape[0], dtype=torch.float64)
        update.column_squares = torch.zeros(update.shape[1], dtype=torch.float64)
        if operands.magnitude is not None:
            _set_factors(update, operands.magnitude)
            _set_norms(update)
        elif operands.up is not None and operands.down is not None:
            up, down = operands.up.double(), operands.down.double()
            # Norms of up @ down, from the small Gram matrices.
            update.row_squares = ((up @ (down @ down.T)) * up).sum(dim=1).clamp_min(0)
            update.column_squares = (((up.T @ up) @ down) * down).sum(dim=0).clamp_min(0)
        yield update


def _set_factors(update: Update, magnitude: Tensor) -> None:
    if update.piece.module.magnitude_is is MagnitudeKind.FACTOR:
        update.factor, update.excess = magnitude, (magnitude.double() - 1).to(update.dtype)
        return
    if update.by_row:
        rows = [update.squares(v).sum(dim=1) for _, _, v, _ in update.directions()]
        squares = torch.cat(rows)
    else:
        squares = torch.zeros(update.shape[1], dtype=torch.float64)
        for _, _, direction, _ in update.directions():
            squares += square_sums(direction)
    factor, update.faults = column_factors(magnitude, squares)
    update.factor = factor.to(update.dtype)
    update.excess = (factor - 1).to(update.dtype)


def _set_norms(update: Update) -> None:
    for start, stop, direction, low_rank in update.directions():
        span = slice(start, stop) if update.by_row else slice(None)
        # T = c V - W = (c - 1) V + D, without the cancellation of the first form.
        block = direction.mul_(update.excess[span].unsqueeze(1 if update.by_row else 0))
        update.by_magnitude += float(update.squares(block).sum())
        squares = update.squares(block.add_(low_rank))
        update.row_squares[start:stop] = squares.sum(dim=1)
        update.column_squares += squares.sum(dim=0)
