"""The paper's formula on some rows of a weight, in float64, for `verify`.

It shares nothing with the kernels and their operands: tensors are read by the witness, and every
form of an update is written out here once more, `core.deltas` being its definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.deltas import Delta, Hadamard, Kronecker, LowRank, Tucker
from dora_convert.core.plan import Merge, Piece, Quantise
from dora_convert.core.tensors import TensorRef
from dora_convert.execution.witness import source_rows, whole, whole_rows

__all__ = ["blocks", "expected_factors", "expected_rows", "norms_of_columns"]

_BLOCK = 1 << 20  # elements of one block, whatever the tensor


def blocks(rows: int, columns: int) -> Iterator[range]:
    """All row numbers, so many at a time that they fill a block."""
    step = max(1, _BLOCK // max(columns, 1))
    return (range(i, min(i + step, rows)) for i in range(0, rows, step))


def norms_of_columns(op: Merge | Quantise) -> dict[int, Tensor]:
    """For the pieces that need them, by identity."""
    return {
        id(piece): _column_norms(op.base, piece.module)
        for piece in op.pieces
        if _needs_columns(piece)
    }


def expected_rows(
    op: Merge | Quantise, rows: Sequence[int], norms: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """W and W' of some rows; `norms` as `norms_of_columns` gives them."""
    base = source_rows(op.base, rows).double()
    exact = base.clone()
    for piece in op.pieces:
        inside = [i for i, row in enumerate(rows) if piece.start <= row < piece.stop]
        if inside:
            module_rows = [rows[i] - piece.start + piece.offset for i in inside]
            exact[inside] = _exact(base[inside], piece.module, module_rows, norms.get(id(piece)))
    return base, exact


def expected_factors(base: TensorRef, piece: Piece) -> Tensor:
    """`m / ||V||` of a piece's rows, or of all columns; 0 for what has no length."""
    module = piece.module
    assert module.magnitude is not None
    magnitude, by_row = whole(module.magnitude), module.axis is MagnitudeAxis.OUT
    if by_row:
        magnitude = magnitude[piece.offset : piece.offset + piece.stop - piece.start]
    else:
        magnitude = _spread(magnitude, base.spec.shape[1])
    if module.magnitude_is is MagnitudeKind.FACTOR:
        return magnitude
    length = _row_norms(base, piece) if by_row else _column_norms(base, module)
    return torch.where(length > 0, magnitude / length, torch.zeros_like(length))


def _exact(base: Tensor, module: DoraModule, rows: Sequence[int], norms: Tensor | None) -> Tensor:
    direction = _direction(base, module, rows)
    if module.magnitude is None:
        return direction
    magnitude = whole(module.magnitude)
    by_row = module.axis is MagnitudeAxis.OUT
    magnitude = magnitude[list(rows)].unsqueeze(1) if by_row else _spread(magnitude, base.shape[1])
    if module.magnitude_is is MagnitudeKind.FACTOR:
        return direction * magnitude
    length = direction.square().sum(dim=1, keepdim=True).sqrt() if norms is None else norms
    return torch.where(length > 0, magnitude * direction / length, torch.zeros_like(direction))


def _direction(base: Tensor, module: DoraModule, rows: Sequence[int]) -> Tensor:
    """V of a module's `rows`, of which `base` is W."""
    if module.delta is None:
        return base
    return base + module.scaling * _rows(module.delta, rows)


def _rows(delta: Delta | TensorRef, rows: Sequence[int]) -> Tensor:
    """Of an update before scaling, or of a factor of one; rows may be named twice."""
    match delta:
        case LowRank(down, up):
            return whole_rows(up, rows) @ whole(down)
        case Tucker(down, mid, up):
            parts = whole_rows(up, rows), whole(mid), whole(down)
            return torch.einsum("om,mn...,ni->oi...", *parts).flatten(1)
        case Hadamard(left, right):
            return _rows(left, rows) * _rows(right, rows)
        case Kronecker(left, right):
            height = right.spec.shape[0] if isinstance(right, TensorRef) else right.shape[0]
            pair = (
                _rows(left, [row // height for row in rows]),
                _rows(right, [row % height for row in rows]),
            )
            return torch.einsum("ra,rb->rab", *pair).flatten(1)
        case TensorRef():
            return whole_rows(delta, rows)


def _needs_columns(piece: Piece) -> bool:
    module = piece.module
    return (
        module.axis is MagnitudeAxis.IN
        and module.magnitude is not None
        and module.magnitude_is is MagnitudeKind.NORM
    )


def _row_norms(base: TensorRef, piece: Piece) -> Tensor:
    norms = []
    for block in blocks(piece.stop - piece.start, base.spec.shape[1]):
        weight = source_rows(base, [piece.start + i for i in block]).double()
        direction = _direction(weight, piece.module, [piece.offset + i for i in block])
        norms.append(direction.square().sum(dim=1).sqrt())
    return torch.cat(norms)


def _column_norms(base: TensorRef, module: DoraModule) -> Tensor:
    """For every column that of its channel, which in a convolution has several."""
    assert module.magnitude is not None
    rows, columns = base.spec.shape
    total = torch.zeros(columns, dtype=torch.float64)
    for block in blocks(rows, columns):
        direction = _direction(source_rows(base, block).double(), module, block)
        total += direction.square().sum(dim=0)
    channels = module.magnitude.spec.numel
    return _spread(total.view(channels, columns // channels).sum(dim=1).sqrt(), columns)


def _spread(channels: Tensor, columns: int) -> Tensor:
    """A channel's number for each of its columns."""
    each = columns // len(channels)
    return channels.unsqueeze(1).expand(len(channels), each).reshape(columns)
