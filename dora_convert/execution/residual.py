"""What a quantised result misses of the merged weights, `R = W' - Q(W')`, as a LoRA's factors.

`Q(W')` is decoded from the finished file. R takes as long to make as both of them, and a
factorisation multiplies with it many times: so one module's R at a time lies in a scratch file.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from dora_convert.core.plan import Job, Piece, Quantise
from dora_convert.core.reports import Residual, ResidualFigures
from dora_convert.core.tensors import DType, Slice, TensorRef, TensorSpec
from dora_convert.execution.decoding import open_reader
from dora_convert.execution.kernels import Input, merged_rows, sum_columns
from dora_convert.execution.lanes import BLOCK_BYTES, Buffers
from dora_convert.execution.memory import trim
from dora_convert.execution.project import Weights
from dora_convert.execution.threads import in_threads
from dora_convert.execution.units import Unit, is_two_pass
from dora_convert.maths.compare import relative
from dora_convert.maths.dora import column_factors
from dora_convert.maths.krylov import krylov_factors, spans_everything
from dora_convert.maths.lowrank import Factors, Flipped, Operator, exact_factors
from dora_convert.maths.weighting import Weight, Weighted, unweighted
from dora_convert.storage.oserrors import writing
from dora_convert.storage.reader import Reader

__all__ = ["Missed", "correct"]


@dataclass(frozen=True, slots=True)
class Missed:
    """The rows of `piece` in a quantised tensor: how they came about, and what is stored."""

    job: Job
    piece: Piece
    stored: TensorRef  # decoded

    @property
    def shape(self) -> tuple[int, int]:
        """`[rows, columns]` of the stored weight's part."""
        return self.piece.stop - self.piece.start, self.stored.spec.shape[1]


@dataclass(slots=True)
class _Sums:
    """Over elements, with T = W' - W and P the low-rank pair; modules add up."""

    merged: float = 0.0  # W'^2
    effect: float = 0.0  # T^2
    missed: float = 0.0  # R^2
    left: float = 0.0  # (R - P)^2
    missed_effect: float = 0.0  # R T
    left_effect: float = 0.0  # (R - P) T

    def add(self, other: _Sums) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def figures(self) -> ResidualFigures:
        return ResidualFigures(
            error=relative(self.missed, self.merged),
            corrected_error=relative(self.left, self.merged),
            kept=1 - self.missed_effect / self.effect if self.effect else 1.0,
            corrected_kept=1 - self.left_effect / self.effect if self.effect else 1.0,
        )


def correct(
    modules: Mapping[str, Sequence[Missed]],
    rank: int,
    keep: Callable[[str, Factors], None],
    *,
    folder: Path,
    workers: int,
    seed: int = 0,
    weights: Weights | None = None,
) -> Residual:
    """Hand the best `rank` factors of every module's R to `keep`, from several threads.

    `folder` holds the scratch files, one for each thread at a time.
    """
    reader = open_reader()
    sums: dict[str, _Sums] = {}

    def work(item: tuple[int, tuple[str, Sequence[Missed]]]) -> None:
        index, (path, parts) = item
        buffers = Buffers()
        scales = [_column_factors(part, reader, buffers) for part in parts]
        file = folder / f"{index}.matrix"
        try:
            stored = _spilled(parts, scales, file, reader, buffers)
            # By path, so that neither order nor threads change what a module gets.
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(path.encode()))
            weighting = None if weights is None else weights(path)
            factors = _approximate(stored, rank, generator, weighting)
        finally:
            file.unlink(missing_ok=True)
        sums[path] = _measured(parts, scales, factors, reader, buffers)
        keep(path, factors)
        trim()

    in_threads(list(enumerate(modules.items())), work, workers)
    total = _Sums()
    for path in modules:
        total.add(sums[path])
    return Residual(rank, total.figures(), {path: sums[path].figures() for path in sorted(sums)})


def _column_factors(part: Missed, reader: Reader, buffers: Buffers) -> dict[str, Tensor]:
    """Of a module with axis IN: what its columns are multiplied by, by tensor name."""
    if not is_two_pass(part.job):
        return {}
    magnitude = part.piece.module.magnitude
    assert magnitude is not None
    unit = Unit(0, part.job, 0, part.stored.spec.shape[0])
    squares = sum_columns(unit, reader, buffers)
    return {part.job.output.name: column_factors(reader.load(magnitude), squares)[0]}


def _rows(
    part: Missed, factors: Mapping[str, Tensor], reader: Reader, buffers: Buffers
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Blocks `(start, stop, W, W', Q(W'))` in the working type, from the module's first row on."""
    op = part.job.op
    assert isinstance(op, Quantise)
    first = part.piece.start
    unit = Unit(0, part.job, first, part.piece.stop)
    blocks = merged_rows(unit, op.base, op.pieces, Input(reader, buffers, factors))
    nothing = torch.empty(0, dtype=torch.uint8)
    with reader.rows(part.stored) as stored:
        for block in blocks:
            start, stop, merged = block.start, block.stop, block.rows
            before = block.base.to(merged.dtype)
            held = stored.read(start, stop, nothing).to(merged.dtype)
            yield start - first, stop - first, before, merged, held


def _spilled(
    parts: Sequence[Missed],
    scales: Sequence[Mapping[str, Tensor]],
    file: Path,
    reader: Reader,
    buffers: Buffers,
) -> _Matrix:
    rows, columns = [], torch.zeros(parts[0].shape[1], dtype=torch.float64)
    with writing(file), file.open("wb") as handle:
        for part, factors in zip(parts, scales, strict=True):
            for _, _, _, merged, held in _rows(part, factors, reader, buffers):
                missed = merged.sub_(held).float().contiguous()
                squares = missed.square()
                rows.append(squares.sum(dim=1, dtype=torch.float64))
                columns += squares.sum(dim=0)
                handle.write(missed.numpy().data)
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    spec = TensorSpec("missed", DType.F32, shape)
    return _Matrix(TensorRef(spec, Slice(file, 0), spec), torch.cat(rows), columns, reader, buffers)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix in a file as an operator, and the squared norms of its rows and columns."""

    ref: TensorRef
    row_squares: Tensor
    column_squares: Tensor
    reader: Reader
    buffers: Buffers

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.ref.spec.shape
        return rows, columns

    def times(self, x: Tensor) -> Tensor:
        x = x.float()
        return torch.cat([block @ x for _, _, block in self._blocks()])

    def transposed_times(self, y: Tensor) -> Tensor:
        y = y.float()
        result = torch.zeros((self.shape[1], y.shape[1]))
        for start, stop, block in self._blocks():
            result.addmm_(block.T, y[start:stop])
        return result

    def round_trip(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        image = torch.empty((self.shape[0], x.shape[1]))
        returned = torch.zeros((self.shape[1], x.shape[1]))
        for start, stop, block in self._blocks():
            torch.mm(block, x, out=image[start:stop])
            returned.addmm_(block.T, image[start:stop])
        return image, returned

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        with self.reader.rows(self.ref) as blocks:
            for start, stop in blocks.spans(0, self.shape[0], BLOCK_BYTES):
                raw = self.buffers.take("raw", self.ref.spec.row_bytes * (stop - start))
                yield start, stop, blocks.read(start, stop, raw)


def _approximate(
    missed: _Matrix,
    rank: int,
    generator: torch.Generator,
    weighting: tuple[Weight, bool] | None,
) -> Factors:
    """A weighted one is turned to the layer's sense and back, as in `project`."""
    if weighting is None:
        return _best(missed, rank, generator, float(missed.row_squares.sum()))
    weight, is_flipped = weighting
    operator = Flipped(missed) if is_flipped else missed
    seen = weight.square(operator, missed.row_squares if is_flipped else missed.column_squares)
    found = _best(Weighted(operator, weight), rank, generator, seen)
    factors = unweighted(operator, found.left)
    return factors.transposed() if is_flipped else factors


def _best(operator: Operator, rank: int, generator: torch.Generator, square: float) -> Factors:
    rank = min(rank, *operator.shape)
    if spans_everything(operator.shape, rank):
        return exact_factors(operator).truncated(rank)
    return krylov_factors(operator, rank, generator, square)


def _measured(
    parts: Sequence[Missed],
    scales: Sequence[Mapping[str, Tensor]],
    factors: Factors,
    reader: Reader,
    buffers: Buffers,
) -> _Sums:
    """The definitions, block by block, with the pair as it will be stored."""
    sums = _Sums()
    root = factors.singular.sqrt()
    left, right = (factors.left * root).float(), (root.unsqueeze(1) * factors.right).float()
    offset = 0
    for part, scale in zip(parts, scales, strict=True):
        for start, stop, base, merged, held in _rows(part, scale, reader, buffers):
            rows = slice(offset + start, offset + stop)
            pair = left[rows].to(merged.dtype) @ right.to(merged.dtype)
            effect, missed = merged - base, merged - held
            rest = missed - pair
            sums.add(
                _Sums(
                    merged=_dot(merged, merged),
                    effect=_dot(effect, effect),
                    missed=_dot(missed, missed),
                    left=_dot(rest, rest),
                    missed_effect=_dot(missed, effect),
                    left_effect=_dot(rest, effect),
                )
            )
        offset += part.shape[0]
    return sums


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))
