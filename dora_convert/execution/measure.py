"""What the adapter does to every module, over all of its rows: the figures of `inspect`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Merge, Piece, Plan
from dora_convert.core.reports import Figures
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.execution.decoding import open_reader
from dora_convert.execution.kernels import Operands, figure_dtype
from dora_convert.execution.threads import in_threads
from dora_convert.maths.compare import ModuleSums, block_sums, relative
from dora_convert.maths.dora import add_update
from dora_convert.storage.dtypes import TORCH
from dora_convert.storage.reader import Reader

__all__ = ["figures", "module_sums", "storage_label"]

_BLOCK = 1 << 20
# Columns are gathered for axis IN: a panel of a tall matrix at a time.
_PANEL = 64 << 20
_ALL = slice(None)


def module_sums(plan: Plan, *, workers: int) -> dict[str, ModuleSums]:
    """Sums by module path, for every module that the plan merges."""
    reader = open_reader()
    work = [
        (job.op.base, piece, _rounding(job.output.dtype))
        for job in plan.jobs
        if isinstance(job.op, Merge)
        for piece in job.op.pieces
    ]
    results: list[tuple[str, ModuleSums]] = []

    def measure(item: tuple[TensorRef, Piece, torch.dtype]) -> None:
        base, piece, rounding = item
        by_row = piece.module.axis is MagnitudeAxis.OUT or piece.module.magnitude is None
        results.append(
            (piece.module.path, (_rows if by_row else _columns)(base, piece, rounding, reader))
        )

    in_threads(work, measure, workers)
    sums: dict[str, ModuleSums] = {}
    for path, part in sorted(results, key=lambda item: item[0]):
        sums.setdefault(path, ModuleSums()).add(part)
    return sums


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
    sums = ModuleSums()
    dtype = figure_dtype(base.spec.dtype)
    operands = Operands.load(reader, piece, piece.start, piece.stop, dtype)
    buffer = torch.empty(max(_BLOCK, base.spec.row_bytes), dtype=torch.uint8)
    with reader.rows(base) as blocks:
        for start, stop in blocks.spans(piece.start, piece.stop, _BLOCK):
            span = slice(start - piece.start, stop - piece.start)
            weight = blocks.read(start, stop, buffer).to(dtype)
            magnitude = operands.magnitude[span] if operands.magnitude is not None else None
            direction = _moved(weight, operands, rows=span)
            magnitude = _as_norms(magnitude, direction, piece.module)
            sums.add(block_sums(weight, direction, magnitude, rounding))
    return sums


def _columns(base: TensorRef, piece: Piece, rounding: torch.dtype, reader: Reader) -> ModuleSums:
    """Axis IN: a panel of columns at a time, turned into rows."""
    sums = ModuleSums()
    dtype = figure_dtype(base.spec.dtype)
    operands = Operands.load(reader, piece, 0, base.spec.shape[0], dtype)
    assert operands.magnitude is not None
    rows, columns = base.spec.shape
    width = max(1, _PANEL // (rows * dtype.itemsize))
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        weight = _panel(base, start, stop, reader).to(dtype)
        direction = _moved(weight, operands, columns=slice(start, stop))
        magnitude = _as_norms(operands.magnitude[start:stop], direction.T, piece.module)
        sums.add(block_sums(weight.T, direction.T, magnitude, rounding))
    return sums


def _panel(base: TensorRef, start: int, stop: int, reader: Reader) -> Tensor:
    """Columns `start:stop` of all rows."""
    buffer = torch.empty(max(_BLOCK, base.spec.row_bytes), dtype=torch.uint8)
    panel = torch.empty((base.spec.shape[0], stop - start), dtype=TORCH[base.spec.dtype])
    with reader.rows(base) as blocks:
        for first, last in blocks.spans(0, base.spec.shape[0], _BLOCK):
            panel[first:last] = blocks.read(first, last, buffer)[:, start:stop]
    return panel


def _moved(
    weight: Tensor, operands: Operands, *, rows: slice = _ALL, columns: slice = _ALL
) -> Tensor:
    """V of a part of W: of some rows, or of some columns."""
    direction = weight.clone()
    if operands.up is not None and operands.down is not None:
        add_update(direction, operands.up[rows], operands.down[:, columns])
    return direction


def _as_norms(magnitude: Tensor | None, direction: Tensor, module: DoraModule) -> Tensor | None:
    """The lengths that the vectors get, also where the file holds `m / ||V||`."""
    if magnitude is None or module.magnitude_is is MagnitudeKind.NORM:
        return magnitude
    norms: Tensor = torch.linalg.vector_norm(direction, dim=1)
    return magnitude * norms


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
