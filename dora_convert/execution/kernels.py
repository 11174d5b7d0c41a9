"""One unit of work: rows in, rows out, through buffers that are allocated once a worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Cast, Copy, Merge, PatchRows, Piece, Quantise, ScaleBias
from dora_convert.core.tensors import DType, Encoded, Slice, TensorRef
from dora_convert.errors import InputError
from dora_convert.execution.lanes import Buffers
from dora_convert.execution.operands import Operands
from dora_convert.execution.units import Unit
from dora_convert.maths.dora import (
    RowFaults,
    column_factors,
    overflows,
    per_column,
    scale_by,
    scale_rows,
    square_sums,
)
from dora_convert.storage.dtypes import TORCH
from dora_convert.storage.opening import opened
from dora_convert.storage.oserrors import reading
from dora_convert.storage.reader import Reader

__all__ = [
    "Block",
    "Input",
    "Output",
    "Target",
    "figure_dtype",
    "merged_rows",
    "run_unit",
    "sum_columns",
    "work_dtype",
]


@dataclass(frozen=True, slots=True)
class Input:
    """What a unit's rows are made with; `factors` are those of columns, by tensor name."""

    reader: Reader
    buffers: Buffers
    factors: Mapping[str, Tensor]


class Target(Protocol):
    """What takes the bytes of a shard's tensors; `ShardWriter` says how."""

    def write(self, name: str, offset: int, data: Tensor) -> None:
        """Bytes at `offset` of a tensor."""

    def overwrite(self, name: str, offset: int, data: Tensor) -> None:
        """The same over bytes that were written before."""

    def copy(self, name: str, offset: int, source: int, start: int, *, nbytes: int) -> None:
        """Bytes of an open file."""


@dataclass(frozen=True, slots=True)
class Output(Input):
    """The same, and where the bytes go."""

    writer: Target


def work_dtype(*kinds: DType) -> torch.dtype:
    """What a merge between these types is computed in.

    float32 has sixteen bits more than bfloat16, enough to round it right. It has too few for
    float16, where one element in three thousand would be rounded the other way, and none to spare
    for float32 itself.
    """
    return torch.float32 if set(kinds) == {DType.BF16} else torch.float64


def figure_dtype(kind: DType) -> torch.dtype:
    """What norms, sums and spectra of a weight are computed in, where no bit is written."""
    return torch.float64 if kind in (DType.F32, DType.F64) else torch.float32


def run_unit(unit: Unit, out: Output) -> RowFaults:
    """Do it, unless it is for `quantise`; returns the rows whose result is undefined."""
    match unit.job.op:
        case Copy(source):
            _copy(unit, source, out)
        case Cast(source):
            return _cast(unit, source, out)
        case PatchRows(base, patch):
            faults = _copy_or_cast(unit, base, out)
            rows = out.reader.load(patch.rows).to(TORCH[unit.job.output.dtype]).contiguous()
            data = rows.view(torch.uint8)
            for i, index in enumerate(patch.indices):
                out.writer.overwrite(unit.job.output.name, index * data.shape[1], data[i])
            return faults
        case Merge(base, pieces):
            return _merge(unit, base, pieces, out)
        case ScaleBias(source, base, pieces):
            return _scale_bias(unit, source, base, pieces, out)
        case Quantise():
            raise AssertionError(unit)
    return RowFaults()


def sum_columns(unit: Unit, reader: Reader, buffers: Buffers) -> Tensor:
    """First pass over an IN job: squared norms of V's columns over the unit's rows, `[in]`."""
    assert isinstance(unit.job.op, Merge | Quantise)
    base, (piece,) = unit.job.op.base, unit.job.op.pieces
    return _column_squares(unit, base, piece, reader, buffers)


def _column_squares(
    unit: Unit, base: TensorRef, piece: Piece, reader: Reader, buffers: Buffers
) -> Tensor:
    dtype = work_dtype(base.spec.dtype, unit.job.output.dtype)
    operands = Operands.load(reader, piece, unit.start, unit.stop, dtype).on(buffers.device)
    total = torch.zeros(base.spec.shape[1], dtype=torch.float64, device=buffers.device)
    for _, _, direction in _directions(unit, base, operands, reader, buffers):
        total += square_sums(direction)
    return total.cpu()


def _directions(
    unit: Unit, base: TensorRef, operands: Operands, reader: Reader, buffers: Buffers
) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks `(start, stop, V)` of a unit that one module covers."""
    dtype = work_dtype(base.spec.dtype, unit.job.output.dtype)
    with reader.rows(base) as blocks:
        for start, stop in blocks.spans(unit.start, unit.stop, buffers.block_bytes):
            work = buffers.working(blocks.fetch(start, stop, buffers), dtype)
            if operands.delta is not None:
                operands.delta.add_to(work, start - unit.start)
            yield start, stop, work


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start:stop` on the worker's device, until the next are asked for.

    `base` is W as it was read, `rows` is W' in the working type.
    """

    start: int
    stop: int
    base: Tensor
    rows: Tensor
    faults: RowFaults


def merged_rows(
    unit: Unit, base: TensorRef, pieces: tuple[Piece, ...], given: Input, *, multiple: int = 1
) -> Iterator[Block]:
    """Blocks of a unit; rows outside every piece are the base's own.

    Blocks have a multiple of `multiple` rows, but for the last.
    """
    dtype = work_dtype(base.spec.dtype, unit.job.output.dtype)
    buffers = given.buffers
    spans = _spans(unit, pieces, given, dtype)
    factors = given.factors.get(unit.job.output.name)
    if factors is not None:
        factors = factors.to(buffers.device, dtype)
    with given.reader.rows(base) as blocks:
        cuts = blocks.spans(unit.start, unit.stop, buffers.block_bytes, multiple=multiple)
        for start, stop in cuts:
            stored = blocks.fetch(start, stop, buffers)
            work = buffers.working(stored, dtype)
            faults = RowFaults()
            for span in spans:
                a, b = max(start, span.start), min(stop, span.stop)
                if a < b:
                    faults += _merge_part(work[a - start : b - start], span, a, factors)
            yield Block(start, stop, stored, work, faults)


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows `start:stop` that one module covers, and its factors for them."""

    start: int
    stop: int
    module: DoraModule
    operands: Operands


def _spans(unit: Unit, pieces: tuple[Piece, ...], given: Input, dtype: torch.dtype) -> list[_Span]:
    spans = []
    for piece in pieces:
        start, stop = max(piece.start, unit.start), min(piece.stop, unit.stop)
        if start < stop:
            operands = Operands.load(given.reader, piece, start, stop, dtype)
            spans.append(_Span(start, stop, piece.module, operands.on(given.buffers.device)))
    return spans


def _merge_part(work: Tensor, span: _Span, start: int, factors: Tensor | None) -> RowFaults:
    """Rows from `start` on, of W in place to those of W'; `factors` are those of columns."""
    operands = span.operands
    first = start - span.start
    if operands.delta is not None:
        operands.delta.add_to(work, first)
    if factors is not None:
        work.mul_(factors)
    elif operands.magnitude is not None:
        return _scale(work, span.module, operands.magnitude, first)
    return RowFaults()


def _merge(unit: Unit, base: TensorRef, pieces: tuple[Piece, ...], out: Output) -> RowFaults:
    faults = RowFaults()
    name, dtype = unit.job.output.name, TORCH[unit.job.output.dtype]
    row_bytes = base.spec.shape[1] * dtype.itemsize
    for block in merged_rows(unit, base, pieces, out):
        put = partial(out.writer.write, name, block.start * row_bytes)
        faults += block.faults + overflows(block.rows, out.buffers.send(block.rows, dtype, put))
    out.buffers.finish()
    return faults


def _scale(work: Tensor, module: DoraModule, magnitude: Tensor, first: int) -> RowFaults:
    """Rows of V in place to those of W'; they are the span's from `first` on."""
    if module.axis is MagnitudeAxis.IN:  # a factor, for norms of columns take a pass of their own
        return scale_by(work, per_column(magnitude, work.shape[1]))
    own = magnitude[first : first + work.shape[0]]
    if module.magnitude_is is MagnitudeKind.NORM:
        return scale_rows(work, own)
    return scale_by(work, own.unsqueeze(1))


def _scale_bias(
    unit: Unit, source: TensorRef, base: TensorRef, pieces: tuple[Piece, ...], out: Output
) -> RowFaults:
    """The layer's weight is read again for its norms: a bias is scaled too seldom to keep them."""
    bias = out.reader.load(source).double()
    faults = RowFaults()
    for piece in pieces:
        by_row = piece.module.axis is MagnitudeAxis.OUT
        part = bias[piece.start : piece.stop] if by_row else bias
        factor, fault = _bias_factors(
            Unit(unit.shard, unit.job, piece.start, piece.stop), base, piece, out
        )
        part *= factor
        faults += fault
    narrow = bias.to(TORCH[unit.job.output.dtype])
    faults += overflows(bias, narrow)
    out.writer.write(unit.job.output.name, 0, narrow.view(torch.uint8))
    return faults


def _bias_factors(
    unit: Unit, base: TensorRef, piece: Piece, out: Output
) -> tuple[Tensor, RowFaults]:
    """`m / ||V||` of one piece, by row of the layer."""
    module = piece.module
    assert module.magnitude is not None
    magnitude = out.reader.load(module.magnitude).double()
    by_row = module.axis is MagnitudeAxis.OUT
    if by_row:
        magnitude = magnitude[piece.offset : piece.offset + piece.stop - piece.start]
    if module.magnitude_is is MagnitudeKind.FACTOR:
        return magnitude, RowFaults()
    if not by_row:
        squares = _column_squares(unit, base, piece, out.reader, out.buffers)
        return column_factors(magnitude, squares)
    dtype = work_dtype(base.spec.dtype, unit.job.output.dtype)
    operands = Operands.load(out.reader, piece, unit.start, unit.stop, dtype).on(out.buffers.device)
    directions = _directions(unit, base, operands, out.reader, out.buffers)
    squares = torch.cat([v.double().square().sum(dim=1) for _, _, v in directions]).cpu()
    return column_factors(magnitude, squares)


def _copy_or_cast(unit: Unit, source: TensorRef, out: Output) -> RowFaults:
    if isinstance(source.source, Encoded):
        return _cast(Unit(unit.shard, unit.job, 0, source.spec.shape[0]), source, out)
    if source.spec.dtype is not unit.job.output.dtype:
        return _cast(unit, source, out)
    _copy(Unit(unit.shard, unit.job, 0, unit.job.output.nbytes), source, out)
    return RowFaults()


def _copy(unit: Unit, source: TensorRef, out: Output) -> None:
    name = unit.job.output.name
    if isinstance(source.source, Slice) and not source.view:
        file, nbytes = source.source.file, unit.stop - unit.start
        start = source.source.start + unit.start
        with opened(file) as (fd, _), reading(file):
            try:
                out.writer.copy(name, unit.start, fd, start, nbytes=nbytes)
            except EOFError:
                raise InputError(
                    f"{file.name} became shorter while it was read", where=str(file)
                ) from None
    else:
        whole = out.reader.load(source).contiguous()
        out.writer.write(name, 0, whole.view(-1).view(torch.uint8))


def _cast(unit: Unit, source: TensorRef, out: Output) -> RowFaults:
    faults = RowFaults()
    name, dtype = unit.job.output.name, TORCH[unit.job.output.dtype]
    matrix = source.matrix()
    rows, columns = matrix.spec.shape
    # What is decoded is cut into units by rows; other casts are one unit.
    span = (unit.start, unit.stop) if isinstance(source.source, Encoded) else (0, rows)
    with out.reader.rows(matrix) as blocks:
        for start, stop in blocks.spans(*span, out.buffers.block_bytes):
            stored = blocks.fetch(start, stop, out.buffers)
            put = partial(out.writer.write, name, start * columns * dtype.itemsize)
            faults += overflows(stored, out.buffers.send(stored, dtype, put))
    out.buffers.finish()
    return faults
