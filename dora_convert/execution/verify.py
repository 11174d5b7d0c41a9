"""Recomputing a result by another road: safetensors' own reader, and the formula in float64.

The kernel that wrote the result is not used here, and neither is this package's reader of
bytes, but for types that no other reader has.
Only the plan is shared: what was to be done, not how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dora_convert import quant
from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.plan import (
    Cast,
    Copy,
    Job,
    Merge,
    PatchRows,
    Plan,
    Quantise,
    ScaleBias,
)
from dora_convert.core.reports import Rounding, Verification
from dora_convert.core.tensors import Slice, TensorRef, TensorSpec, stored_name
from dora_convert.errors import InputError
from dora_convert.execution.formula import (
    blocks,
    expected_factors,
    expected_rows,
    norms_of_columns,
)
from dora_convert.execution.handles import close_handles, handle
from dora_convert.execution.tally import Tally, compare
from dora_convert.execution.threads import in_threads
from dora_convert.execution.witness import (
    requantised,
    rows_of,
    source_rows,
    stored_rows,
    whole,
)
from dora_convert.storage.dtypes import TORCH
from dora_convert.storage.header import read_header
from dora_convert.storage.opening import opened, pread_exactly
from dora_convert.storage.pagecache import want

__all__ = ["verify"]

_BLOCK = 1 << 20  # bytes that are compared at once
_HEIGHT = 16  # rows of one block of a quantised tensor, where its tiles are no taller
_FEW = 1 << 17  # and elements of what is computed of it in float64 at once


def verify(
    plan: Plan,
    files: Mapping[str, Path],
    *,
    samples: int | None,
    tolerance: float = 1.0,
    workers: int = 1,
) -> Verification:
    """Compare the tensors in `files` (tensor name to safetensors file) with what they must be.

    `samples` rows of some modules and as many blocks of untouched tensors are looked at; None
    looks at everything. `tolerance` is in units of the last place of the output's type.
    """
    merges = [job for job in plan.jobs if isinstance(job.op, Merge | Quantise)]
    some = _some(merges, samples)
    chosen = {job.output.name for job in some}
    tallies: dict[str, Tally] = {}
    others = [job for job in plan.jobs if not isinstance(job.op, Merge | Quantise)]
    want(_sampled([*some, *others], files, samples))

    def check(job: Job) -> None:
        own = tallies[job.output.name] = Tally()
        missing = [spec.name for spec in job.stored if spec.name not in files]
        own.differences += [f"{name}: missing" for name in missing]
        if missing or not all(_has_layout(spec, files[spec.name], own) for spec in job.stored):
            return
        file = files[job.stored[0].name]
        match job.op:
            case Merge() as op:
                if job.output.name in chosen:
                    _compare_merge(job, op, file, samples, tolerance, own)
            case Quantise() as op:
                if job.output.name in chosen:
                    _compare_quantised(op, files, samples, own)
            case ScaleBias() as op:
                _compare_bias(job, op, file, tolerance, own)
            case _:
                _compare_plain(job, file, samples, own)

    try:
        in_threads(plan.jobs, _telling(check, tallies), workers)
    finally:
        close_handles()
    tally = Tally()
    for job in plan.jobs:
        tally.add(tallies[job.output.name])
    rounding = None
    if tally.elements and tally.effect:
        rounding = Rounding(
            loss=math.sqrt(tally.noise / tally.effect),
            kept=tally.kept / tally.effect,
            off=tally.off / tally.elements,
        )
    return Verification(
        tensors=len(plan.jobs),
        modules=len(tally.modules),
        rows=tally.rows,
        compared_bytes=tally.compared,
        differences=tuple(tally.differences),
        rounding=rounding,
    )


def _telling(check: Callable[[Job], None], tallies: Mapping[str, Tally]) -> Callable[[Job], None]:
    """What safetensors says of a file that it cannot read is a difference as well."""

    def telling(job: Job) -> None:
        try:
            check(job)
        except SafetensorError as error:
            tallies[job.output.name].differences.append(f"{job.output.name}: {error}")

    return telling


def _has_layout(spec: TensorSpec, file: Path, tally: Tally) -> bool:
    """Whether the stored tensor has the type and the shape that were planned."""
    stored = handle(file).get_slice(stored_name(spec.name))
    dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
    if (dtype, shape) == (spec.dtype.label, spec.shape):
        return True
    tally.differences.append(
        f"{spec.name}: {dtype} {list(shape)}, expected {spec.dtype.label} {list(spec.shape)}"
    )
    return False


def _some(jobs: Sequence[Job], samples: int | None) -> Sequence[Job]:
    if samples is None or len(jobs) <= samples:
        return jobs
    step = len(jobs) / samples
    return [jobs[int(i * step)] for i in range(samples)]


def _spans(rows: int, columns: int, samples: int | None) -> list[list[int]]:
    """Row numbers to look at, in blocks: all, or some from the first to the last."""
    if samples is not None and rows > samples:
        picked = {round(i * (rows - 1) / max(samples - 1, 1)) for i in range(samples)}
        return [sorted(picked)]
    return [list(block) for block in blocks(rows, columns)]


def _sampled(
    jobs: Sequence[Job], files: Mapping[str, Path], samples: int | None
) -> Iterator[tuple[Path, int, int]]:
    """Where the rows of dense tensors lie that will be looked at, where that is not all of them."""
    headers: dict[Path, Mapping[str, TensorRef]] = {}
    for job in jobs if samples is not None else ():
        name, file = job.output.name, files.get(job.output.name)
        if file is None or isinstance(job.op, Quantise):
            continue
        if file not in headers:
            headers[file] = {}
            with suppress(InputError):  # it is told of where it is read
                headers[file] = read_header(file)
        ref = headers[file].get(stored_name(name))
        if ref is not None and len(ref.spec.shape) > 1:
            rows = _spans(ref.spec.shape[0], math.prod(ref.spec.shape[1:]), samples)
            spans = (ref.row_span(i, i + 1) for block in rows for i in block)
            yield from (span for span in spans if span is not None)


def _compare_plain(job: Job, file: Path, samples: int | None, tally: Tally) -> None:
    """Copies, casts and patched rows are exact, bit for bit."""
    name, shape = job.output.name, job.output.shape
    if 0 in shape:
        return
    if job.output.dtype not in TORCH:
        _compare_packed(job, file, tally)
        return
    if not shape:
        value = handle(file).get_tensor(stored_name(name))
        if not _same_bits(value.reshape(1, 1), _scalar(job)):
            tally.differences.append(f"{name}: its value differs")
        return
    columns = math.prod(shape[1:])
    for rows in _spans(shape[0], columns, samples):
        got = rows_of(file, name, rows)
        expected = _expected_rows(job, rows, got.dtype)
        tally.compared += got.numel() * got.dtype.itemsize
        if not _same_bits(got, expected):
            wrong = sum(not _same_bits(a, b) for a, b in zip(got, expected, strict=True))
            tally.differences.append(
                f"{name}: {wrong} of {len(rows)} rows differ from their source"
            )


def _compare_packed(job: Job, file: Path, tally: Tally) -> None:
    """Elements of 4 or 6 bits, which torch does not read: copied, byte for byte."""
    assert isinstance(job.op, Copy)
    spec, copied = job.output, read_header(file)[stored_name(job.output.name)].source
    source = job.op.source.source
    assert isinstance(copied, Slice)
    assert isinstance(source, Slice)
    with opened(file) as (ours, _), opened(source.file) as (theirs, _):
        for at in range(0, spec.nbytes, _BLOCK):
            length = min(_BLOCK, spec.nbytes - at)
            got = pread_exactly(ours, file, length=length, offset=copied.start + at)
            if got != pread_exactly(theirs, source.file, length=length, offset=source.start + at):
                tally.differences.append(f"{spec.name}: its bytes differ from their source")
                return
    tally.compared += spec.nbytes


def _scalar(job: Job) -> Tensor:
    assert isinstance(job.op, Copy | Cast)
    return whole(job.op.source).reshape(1, 1)


def _expected_rows(job: Job, rows: Sequence[int], kind: torch.dtype) -> Tensor:
    match job.op:
        case Copy(source) | Cast(source):
            return source_rows(source, rows).to(kind)
        case PatchRows(base, patch):
            expected = source_rows(base, rows).to(kind, copy=True)
            trained = whole(patch.rows)
            for i, index in enumerate(patch.indices):
                if index in rows:
                    expected[rows.index(index)] = trained[i].to(kind)
            return expected
        case Merge() | ScaleBias() | Quantise():
            raise AssertionError(job)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype is not b.dtype:
        # A scalar that came through float64.
        return bool((a == b.to(a.dtype)).all())
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def _compare_merge(
    job: Job, op: Merge, file: Path, samples: int | None, tolerance: float, tally: Tally
) -> None:
    name, (count, columns) = job.output.name, op.base.spec.shape
    norms = norms_of_columns(op)
    wrong = 0
    for rows in _spans(count, columns, samples):
        base, exact = expected_rows(op, rows, norms)
        got = rows_of(file, name, rows)
        wrong += compare(got, exact, base, tolerance, tally)
        tally.rows += len(rows)
    tally.modules |= {piece.module.path for piece in op.pieces}
    if wrong:
        tally.differences.append(f"{name}: {wrong} values are not the recomputed ones")


def _compare_quantised(
    op: Quantise, files: Mapping[str, Path], samples: int | None, tally: Tally
) -> None:
    """What the file decodes to is as near to W' as the scheme brings those rows on their own."""
    scheme, weight = quant.writable(op.scheme), op.weight
    norms = norms_of_columns(op)
    few = min(_HEIGHT, max(1, _FEW // weight.columns))
    height = max(scheme.row_multiple(weight), few)
    starts = range(0, weight.rows, height)
    if samples is not None:
        # As many rows for a scheme of tall tiles as for any other.
        blocks = -(-samples * few // height)
        starts = starts[:: -(-len(starts) // blocks)]
    far = 0
    for start in starts:
        rows = range(start, min(start + height, weight.rows))
        # In float64 a few at a time: of a tall block that takes much memory.
        exact = torch.cat(
            [
                expected_rows(op, rows[i : i + few], norms)[1].float()
                for i in range(0, len(rows), few)
            ]
        )
        # Statistics of the whole tensor are not those of some rows: hence twice.
        alone = float(requantised(scheme, weight, exact).sub_(exact).norm())
        limit = 2 * alone + 1e-6 * float(exact.norm())
        got = stored_rows(op.scheme, weight, files, rows)
        far += float(got.sub_(exact).norm()) > limit
        tally.rows += len(rows)
    tally.modules |= {piece.module.path for piece in op.pieces}
    if far:
        tally.differences.append(
            f"{weight.dense.name}: {far} blocks of rows do not decode to the recomputed ones"
        )


def _compare_bias(job: Job, op: ScaleBias, file: Path, tolerance: float, tally: Tally) -> None:
    """All of a scaled bias: it is short, though its norms take a pass over the weight."""
    name = job.output.name
    exact = whole(op.source)
    for piece in op.pieces:
        by_row = piece.module.axis is MagnitudeAxis.OUT
        span = slice(piece.start, piece.stop) if by_row else slice(None)
        exact[span] *= expected_factors(op.base, piece)
    got = rows_of(file, name, range(len(exact))).view(1, -1)
    exact = exact.view(1, -1)
    if compare(got, exact, exact, tolerance, Tally()):
        tally.differences.append(f"{name}: the bias is not the recomputed one")
    tally.compared += got.numel() * got.dtype.itemsize
