"""What the adapter does to every module, over all of its rows: the figures of `inspect`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Merge, Piece, Plan
from dora_convert.core.reports import Figures
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.execution.decoding import open_reader
from dora_convert.execution.kernels import figure_dtype
from dora_convert.execution.operands import Operands
from dora_convert.execution.threads import in_threads
from dora_convert.maths.compare import (
    ModuleSums,
    block_sums,
    counted,
    element_sums,
    products,
    relative,
    vector_sums,
)
from dora_convert.maths.dora import channel_sums, per_column
from dora_convert.storage.dtypes import TORCH
from dora_convert.storage.reader import Reader

__all__ = ["figures", "module_sums", "storage_label"]

_BLOCK = 1 << 20


def module_sums(plan: Plan, *, workers: int) -> dict[str, ModuleSums]:
    """Sums by module path, for every module that the plan merges."""
    reader = open_reader()
    work = [
        (job.op.base, piece, _rounding(job.output.dtype))
        for job in plan.jobs
        if isinstance(job.op, Merge)
        for piece in job.op.pieces
    ]
    results = [ModuleSums() for _ in work]

    def measure(place: int) -> None:
        base, piece, rounding = work[place]
        by_row = piece.module.axis is MagnitudeAxis.OUT or piece.module.magnitude is None
        results[place] = (_rows if by_row else _columns)(base, piece, rounding, reader)

    in_threads(range(len(work)), measure, workers)
    sums: dict[str, ModuleSums] = {}
    # Parts of a module in the plan's order, whichever was ready first: sums of floats tell.
    for (_, piece, _), part in zip(work, results, strict=True):
        sums.setdefault(piece.module.path, ModuleSums()).add(part)
    return dict(sorted(sums.items()))


def figures(parts: Sequence[ModuleSums], stored_as: str) -> Figures:
    """The figures of some modules together."""
    total = ModuleSums()
    for part in parts:
        total.add(part)
    mean = total.ratio / max(total.rows, 1)
    variance = total.ratio_square / max(total.rows, 1) - mean * mean
    return Figures(
        update=relative(total.update, total.base),
        effect=relative(total.effect, total.base),
        magnitude_shift=_share(total.magnitude_shift, total.magnitude_base),
        magnitude_bias=mean,
        magnitude_spread=math.sqrt(max(variance, 0.0)),
        direction_shift=total.direction_shift / max(total.rows, 1),
        rounding_loss=relative(total.noise, total.effect),
        kept=_share(total.kept, total.effect),
        stored_as=stored_as,
    )


def storage_label(plan: Plan) -> str:
    """The type, or types, whose rounding the figures of a plan tell of."""
    kinds = {_rounding(job.output.dtype) for job in plan.jobs if isinstance(job.op, Merge)}
    return ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def _rounding(dtype: DType) -> torch.dtype:
    """The 16-bit type whose loss is worth knowing: bfloat16 where the base is wider."""
    return TORCH[dtype] if dtype in (DType.F16, DType.BF16) else torch.bfloat16


def _rows(base: TensorRef, piece: Piece, rounding: torch.dtype, reader: Reader) -> ModuleSums:
    """Axis OUT: every row is seen whole."""
    sums = ModuleSums()
    operands = _operands(base, piece, reader)
    for start, weight, direction in _blocks(base, piece, operands, reader):
        magnitude = operands.magnitude
        if magnitude is not None:
            lengths = torch.linalg.vector_norm(direction, dim=1)
            magnitude = _as_norms(magnitude[start : start + len(weight)], lengths, piece.module)
        sums.add(block_sums(weight, direction, magnitude, rounding))
    return sums


def _columns(base: TensorRef, piece: Piece, rounding: torch.dtype, reader: Reader) -> ModuleSums:
    """Axis IN: a pass for the norms of each channel's columns, and one for what follows."""
    operands = _operands(base, piece, reader)
    assert operands.magnitude is not None
    columns = base.spec.shape[1]
    squares = torch.zeros((3, columns), dtype=torch.float64)
    for _, weight, direction in _blocks(base, piece, operands, reader):
        squares += products(weight, direction)
    squares = channel_sums(squares, len(operands.magnitude))
    w, n, dot = squares[0].sqrt(), squares[1].sqrt(), squares[2]
    magnitude = _as_norms(operands.magnitude.double(), n, piece.module)
    sums = vector_sums(w, n, dot, magnitude)
    used = per_column(counted(w, n), columns)
    whole = bool(used.all())
    factor = per_column(magnitude / n, columns)[used].to(operands.magnitude.dtype)
    for _, weight, direction in _blocks(base, piece, operands, reader):
        # Indexing copies, which whole blocks are spared.
        pair = (weight, direction) if whole else (weight[:, used], direction[:, used])
        sums.add(element_sums(*pair, factor, rounding))
    return sums


def _operands(base: TensorRef, piece: Piece, reader: Reader) -> Operands:
    return Operands.load(reader, piece, piece.start, piece.stop, figure_dtype(base.spec.dtype))


def _blocks(
    base: TensorRef, piece: Piece, operands: Operands, reader: Reader
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks `(start, W, V)` of the piece's rows; `start` counts from its first."""
    buffer = torch.empty(max(_BLOCK, base.spec.row_bytes), dtype=torch.uint8)
    with reader.rows(base) as blocks:
        for first, last in blocks.spans(piece.start, piece.stop, _BLOCK):
            start = first - piece.start
            weight = blocks.read(first, last, buffer).to(figure_dtype(base.spec.dtype))
            direction = weight.clone()
            if operands.delta is not None:
                operands.delta.add_to(direction, start)
            yield start, weight, direction


def _as_norms(magnitude: Tensor, lengths: Tensor, module: DoraModule) -> Tensor:
    """The lengths that the vectors get, also where the file holds `m / ||V||`."""
    return magnitude if module.magnitude_is is MagnitudeKind.NORM else magnitude * lengths


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
