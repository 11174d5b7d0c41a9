"""The effective update of one module, `T = W' - W`, as an operator over streamed row blocks.

With `D = scaling * delta` and `c = m / ||V||`, T is `diag(c) D + diag(c - 1) W` for axis OUT,
`D diag(c) + W diag(c - 1)` for axis IN. It has full rank in general and is never formed: a product
needs W, read block by block, D as an operator, and c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dora_convert.core.adapter import MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Piece
from dora_convert.core.tensors import TensorRef
from dora_convert.execution.kernels import figure_dtype
from dora_convert.execution.lanes import Buffers
from dora_convert.execution.operands import Operands
from dora_convert.maths.deltas import Delta, LowRank, nothing
from dora_convert.maths.dora import RowFaults, column_factors, per_column
from dora_convert.storage.reader import Reader, RowBlocks

__all__ = ["Update", "open_update"]

# Of ||w||² + ||d||²: what ||w + d||² must be more than to be taken from the sum's expansion.
_CANCELLED = 1e-3


@dataclass(frozen=True, slots=True)
class _Sums:
    """Over each row for axis OUT, each column for IN, with V = W + D; float64."""

    direction: Tensor  # v²
    crossed: Tensor  # v d
    update: Tensor  # d²


@dataclass(slots=True)
class Update:
    """See the module. Norms are computed where they are asked for, from one more reading of W."""

    base: TensorRef
    piece: Piece
    # On the device that `buffers` lead to; sums and squares are on the host.
    delta: Delta  # of rank 0 where the module has none
    magnitude: Tensor | None
    buffers: Buffers
    slot: int
    blocks: RowBlocks
    dtype: torch.dtype
    by_row: bool
    factor: Tensor  # c, [out] or [in]
    excess: Tensor  # c - 1, taken in float64
    faults: RowFaults
    _sums: _Sums | None = None
    _kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)` of the stored weight's part that the module covers."""
        return self.piece.stop - self.piece.start, self.base.spec.shape[1]

    @property
    def square(self) -> float:
        """||T||²."""
        return float(self._squares().sum())

    @property
    def by_magnitude(self) -> float:
        """||T - D||²: what D alone would miss."""
        if self.magnitude is None:
            return 0.0
        return float((self.excess.cpu().double().square() * self.sums().direction).sum())

    @property
    def row_squares(self) -> Tensor:
        """The squared norms of T's rows, `[out]`, float64."""
        return self._squares() if self.by_row else self._other_squares()

    @property
    def column_squares(self) -> Tensor:
        """The squared norms of T's columns, `[in]`, float64."""
        return self._other_squares() if self.by_row else self._squares()

    def times(self, x: Tensor) -> Tensor:
        """`T @ x`."""
        inner, image = self._begun(self._here(x))
        for start, stop, weight in self._scaled_rows():
            self._add(image, inner, start, stop, weight)
        return image

    def transposed_times(self, y: Tensor) -> Tensor:
        """`T.T @ y`."""
        y = self._here(y)
        returned = y.new_zeros((y.shape[1], self.shape[1]))
        for start, stop, weight in self._scaled_rows():
            self._add_back(returned, y, start, stop, weight)
        return self._ended(returned, y)

    def round_trip(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`T @ x` and `T.T @ T @ x`, from one reading of W."""
        inner, image = self._begun(self._here(x))
        returned = image.new_zeros((x.shape[1], self.shape[1]))
        for start, stop, weight in self._scaled_rows():
            self._add(image, inner, start, stop, weight)
            self._add_back(returned, image, start, stop, weight)
        return image, self._ended(returned, image)

    def sums(self) -> _Sums:
        """From one reading of W, the first time."""
        if self._sums is None:
            self._sums = _measured(self)
        return self._sums

    def directions(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Blocks of V and of D."""
        for start, stop, work in self.rows():
            update = self._update(start, stop)
            yield start, stop, work.add_(update), update

    def rows(self) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of W in the working type, numbered from the module's first row."""
        for start, stop in self.blocks.spans(0, self.shape[0], self.buffers.block_bytes):
            yield start, stop, self.buffers.working(self._stored(start, stop), self.dtype)

    def squares(self, block: Tensor) -> Tensor:
        """Every element's square, until it is asked for again."""
        rows, columns = block.shape
        scratch, _ = self.buffers.matrix("squares", rows, columns, self.dtype)
        return torch.square(block, out=scratch)

    def updates(self) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of D alone, numbered as those of W."""
        for start, stop in self.blocks.spans(0, self.shape[0], self.buffers.block_bytes):
            yield start, stop, self._update(start, stop)

    def _update(self, start: int, stop: int) -> Tensor:
        block, _ = self.buffers.matrix("update", stop - start, self.shape[1], self.dtype)
        self.delta.fill(block, start)
        return block

    def _changes(self) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of T."""
        for start, stop, direction, update in self.directions():
            excess = self.excess[start:stop].unsqueeze(1) if self.by_row else self.excess
            yield start, stop, direction.mul_(excess).add_(update)

    def _here(self, vectors: Tensor) -> Tensor:
        return vectors.to(self.buffers.device, self.dtype)

    def _stored(self, start: int, stop: int) -> Tensor:
        kept = self._kept.get((start, stop))
        if kept is not None:
            return kept
        first = self.piece.start
        if self.shape[0] * self.base.spec.row_bytes > self.buffers.kept_bytes:
            return self.blocks.fetch(first + start, first + stop, self.buffers)
        # In the same memory for all weights of a worker: new pages cost as much as reading.
        kind = f"kept.{self.slot}.{len(self._kept)}"
        kept = self.blocks.fetch(first + start, first + stop, self.buffers, kind)
        self._kept[start, stop] = kept
        return kept

    def _scaled_rows(self) -> Iterator[tuple[int, int, Tensor]]:
        # Of a plain LoRA's update W is no part, not even where W is NaN.
        return iter(()) if self.magnitude is None else self.rows()

    def _begun(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What rows of W are multiplied with, and D's part of `T @ x`."""
        factor, excess = self.factor.unsqueeze(1), self.excess.unsqueeze(1)
        inner = x if self.by_row else excess * x
        image = self.delta.times(x if self.by_row else factor * x)
        return inner, image.mul_(factor) if self.by_row else image

    def _add(self, image: Tensor, inner: Tensor, start: int, stop: int, weight: Tensor) -> None:
        product = weight @ inner
        if self.by_row:
            image[start:stop].addcmul_(product, self.excess[start:stop].unsqueeze(1))
        else:
            image[start:stop] += product

    def _add_back(self, returned: Tensor, y: Tensor, start: int, stop: int, weight: Tensor) -> None:
        """`returned` is transposed, `[k, in]`: the product takes two thirds of the time so."""
        outer = y[start:stop]
        if self.by_row:
            outer = outer * self.excess[start:stop].unsqueeze(1)
        returned.addmm_(outer.T, weight)

    def _ended(self, returned: Tensor, y: Tensor) -> Tensor:
        """`T.T @ y` from W's part of it."""
        result = returned.T
        factor = self.factor.unsqueeze(1)
        if not self.by_row:
            result = result * self.excess.unsqueeze(1)
        update = self.delta.transposed_times(factor * y if self.by_row else y)
        return result + (update if self.by_row else factor * update)

    def _squares(self) -> Tensor:
        """Squared norms of T's rows where the magnitude is theirs, else of its columns."""
        if self.magnitude is None:
            return _update_squares(self, by_row=self.by_row)
        sums, excess = self.sums(), self.excess.cpu().double()
        # T = c V - W = (c - 1) V + D, without the cancellation of the first form.
        squares = excess.square() * sums.direction + 2 * excess * sums.crossed + sums.update
        return squares.clamp_min(0)

    def _other_squares(self) -> Tensor:
        """The same of the others, from one more reading of W."""
        if self.magnitude is None:
            return _update_squares(self, by_row=not self.by_row)
        return _block_squares(self, self._changes(), by_row=not self.by_row)

    def zeros(self, *shape: int) -> Tensor:
        """For sums, float64."""
        return torch.zeros(shape, dtype=torch.float64, device=self.buffers.device)


@contextmanager
def open_update(
    base: TensorRef, piece: Piece, reader: Reader, buffers: Buffers, slot: int = 0
) -> Iterator[Update]:
    """Read the factors and, where c depends on it, the weight once.

    Updates that share `buffers` at the same time need a slot each: weights may be kept there.
    """
    dtype = figure_dtype(base.spec.dtype)
    operands = Operands.load(reader, piece, piece.start, piece.stop, dtype)
    by_row = piece.module.axis is MagnitudeAxis.OUT
    shape = (piece.stop - piece.start, base.spec.shape[1])
    ones = torch.ones(shape[0 if by_row else 1], dtype=dtype, device=buffers.device)
    delta = nothing(*shape, dtype) if operands.delta is None else operands.delta
    with reader.rows(base) as blocks:
        update = Update(
            base,
            piece,
            delta.to(buffers.device),
            operands.magnitude,
            buffers,
            slot,
            blocks,
            dtype,
            by_row,
            factor=ones,
            excess=torch.zeros_like(ones),
            faults=RowFaults(),
        )
        if operands.magnitude is not None:
            _set_factors(update, operands.magnitude)
        yield update


def _set_factors(update: Update, magnitude: Tensor) -> None:
    if update.piece.module.magnitude_is is MagnitudeKind.FACTOR:
        factor = per_column(magnitude.double(), len(update.factor))
    else:
        factor, update.faults = column_factors(magnitude, update.sums().direction)
    update.factor = factor.to(update.factor)
    update.excess = (factor - 1).to(update.factor)


def _measured(update: Update) -> _Sums:
    """V is not formed: ||w + d||² is `w² + 2 w d + d²`, and `w d` a product with the factors."""
    if not isinstance(update.delta, LowRank):
        return _directly(update)
    weight, crossed = (_of_rows if update.by_row else _of_columns)(update, update.delta)
    low_rank = _update_squares(update, by_row=update.by_row)
    direction = weight + 2 * crossed + low_rank
    if bool((direction < _CANCELLED * (weight + low_rank)).any()):
        return _directly(update)
    return _Sums(direction, crossed + low_rank, low_rank)


def _of_rows(update: Update, delta: LowRank) -> tuple[Tensor, Tensor]:
    """`w²` and `w d` of every row."""
    squares, crossed = update.zeros(2, update.shape[0])
    for start, stop, weight in update.rows():
        squares[start:stop] = update.squares(weight).sum(dim=1)
        crossed[start:stop] = ((weight @ delta.down.T).double() * delta.up[start:stop]).sum(dim=1)
    return squares.cpu(), crossed.cpu()


def _of_columns(update: Update, delta: LowRank) -> tuple[Tensor, Tensor]:
    """The same of every column."""
    squares = update.zeros(update.shape[1])
    product = torch.zeros_like(delta.down)
    for start, stop, weight in update.rows():
        squares += update.squares(weight).sum(dim=0)
        product.addmm_(delta.up[start:stop].T, weight)
    return squares.cpu(), (product.double() * delta.down).sum(dim=0).cpu()


def _directly(update: Update) -> _Sums:
    """By the definitions: where W and D cancel each other, or D is no product."""
    sums = update.zeros(3, update.shape[0 if update.by_row else 1])
    for start, stop, direction, block in update.directions():
        v, d = direction.double(), block.double()
        parts = torch.stack(
            [(a * b).sum(dim=int(update.by_row)) for a, b in ((v, v), (v, d), (d, d))]
        )
        sums[:, slice(start, stop) if update.by_row else slice(None)] += parts
    return _Sums(*sums.cpu())


def _update_squares(update: Update, *, by_row: bool) -> Tensor:
    """Squared norms of D's rows, or of its columns."""
    if isinstance(update.delta, LowRank):
        delta = update.delta
        return (delta.row_squares() if by_row else delta.column_squares()).cpu()
    return _block_squares(update, update.updates(), by_row=by_row)


def _block_squares(
    update: Update, blocks: Iterable[tuple[int, int, Tensor]], *, by_row: bool
) -> Tensor:
    """Squared norms of the rows, or the columns, of a matrix that comes in blocks."""
    total = update.zeros(update.shape[0 if by_row else 1])
    for start, stop, block in blocks:
        if by_row:
            total[start:stop] = update.squares(block).sum(dim=1)
        else:
            total += update.squares(block).sum(dim=0)
    return total.cpu()
