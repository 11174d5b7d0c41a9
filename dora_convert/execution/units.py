"""A plan cut into units of work, each small enough to be shared out and large enough to pay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dora_convert import quant
from dora_convert.core.adapter import MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Cast, Copy, Job, Merge, PatchRows, Plan, Quantise, ScaleBias
from dora_convert.core.tensors import Encoded, Slice, TensorRef
from dora_convert.storage.header import file_order

__all__ = ["Unit", "is_two_pass", "units"]

# Cuts depend on nothing but the plan, so that results do not depend on the machine.
_UNIT_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Unit:
    """Part `start:stop` of one job, in rows; in bytes where bytes are copied as they are.

    `nbytes` are those of the output that it accounts for.
    """

    shard: int
    job: Job
    start: int
    stop: int
    nbytes: int = 0


def is_two_pass(job: Job) -> bool:
    """Whether norms run over the rows, so that all rows must be seen before one is written."""
    return isinstance(job.op, Merge | Quantise) and any(
        piece.module.axis is MagnitudeAxis.IN
        and piece.module.magnitude is not None
        and piece.module.magnitude_is is MagnitudeKind.NORM
        for piece in job.op.pieces
    )


def units(plan: Plan) -> Iterator[Unit]:
    """All units, in the order of shards and of tensors in their files.

    What is written from a file's front on is hashed as it comes; a base's header may have tensors
    in another order than their bytes.
    """
    for index, shard in enumerate(plan.shards):
        for job in sorted(shard.jobs, key=_place):
            yield from _cut(index, job)


def _place(job: Job) -> tuple[int, str]:
    return file_order(max(job.stored, key=lambda spec: spec.nbytes))


def _cut(shard: int, job: Job) -> Iterator[Unit]:
    total = step = 1
    match job.op:
        case Copy(source) if isinstance(source.source, Slice) and not source.view:
            total, step = job.output.nbytes, 2 * _UNIT_BYTES
        case Merge(base):
            total, step = _rows(base)
        case Quantise(base, _, scheme, weight):
            total, step = _rows(base)
            multiple = quant.writable(scheme).row_multiple(weight)
            step = -(-step // multiple) * multiple
        case Cast(source) if isinstance(source.source, Encoded):
            total, step = _rows(source)
        case Copy() | Cast() | PatchRows() | ScaleBias():
            pass  # small, or rare enough to be one piece
    for start in range(0, total, step):
        stop = min(start + step, total)
        whole = job.nbytes
        yield Unit(shard, job, start, stop, whole * stop // total - whole * start // total)


def _rows(ref: TensorRef) -> tuple[int, int]:
    """How many there are, and how many of them make a unit."""
    total = ref.spec.shape[0]
    return total, max(1, _UNIT_BYTES * total // max(ref.spec.nbytes, 1))
