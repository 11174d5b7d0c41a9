"""Recomputing a result by another road: safetensors' own reader, and the formula in float64.

The kernel that wrote the result is not used here, and neither is this package's reader of bytes.
Only the plan is shared: what was to be done, not how.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Cast, Copy, Job, Merge, PatchRows, Piece, Plan, ScaleBias
from dora_convert.core.reports import Rounding, Verification
from dora_convert.core.tensors import Narrowed, Permuted, Pickled, TensorRef
from dora_convert.execution.threads import in_threads

__all__ = ["verify"]

_BLOCK = 1 << 20  # elements of one block, whatever the tensor


@dataclass(slots=True)
class _Tally:
    modules: set[str] = field(default_factory=set)
    rows: int = 0
    compared: int = 0
    elements: int = 0
    off: int = 0
    noise: float = 0.0
    effect: float = 0.0
    kept: float = 0.0
    differences: list[str] = field(default_factory=list)

    def add(self, other: _Tally) -> None:
        """Take over what another job found."""
        self.modules |= other.modules
        self.differences += other.differences
        for name in ("rows", "compared", "elements", "off", "noise", "effect", "kept"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


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
    merges = [job for job in plan.jobs if isinstance(job.op, Merge)]
    chosen = {job.output.name for job in _some(merges, samples)}
    tallies: dict[str, _Tally] = {}

    def check(job: Job) -> None:
        own = tallies[job.output.name] = _Tally()
        file = files.get(job.output.name)
        if file is None:
            own.differences.append(f"{job.output.name}: missing")
        elif _has_layout(job, file, own):
            if isinstance(job.op, ScaleBias):
                _compare_bias(job, job.op, file, tolerance, own)
            elif not isinstance(job.op, Merge):
                _compare_plain(job, file, samples, own)
            elif job.output.name in chosen:
                _compare_merge(job, job.op, file, samples, tolerance, own)

    in_threads(plan.jobs, check, workers)
    tally = _Tally()
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


def _has_layout(job: Job, file: Path, tally: _Tally) -> bool:
    """Whether the stored tensor has the type and the shape that were planned."""
    with safe_open(file, framework="pt") as handle:
        stored = handle.get_slice(job.output.name)
        dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
    if (dtype, shape) == (job.output.dtype.label, job.output.shape):
        return True
    tally.differences.append(
        f"{job.output.name}: {dtype} {list(shape)}, expected "
        f"{job.output.dtype.label} {list(job.output.shape)}"
    )
    return False


def _some(jobs: Sequence[Job], samples: int | None) -> Sequence[Job]:
    if samples is None or len(jobs) <= samples:
        return jobs
    step = len(jobs) / samples
    return [jobs[int(i * step)] for i in range(samples)]


def _rows_of(file: Path, name: str, rows: Sequence[int]) -> Tensor:
    """Rows of a stored tensor as a matrix, by safetensors' own reader."""
    with safe_open(file, framework="pt") as handle:
        stored = handle.get_slice(name)
        if len(rows) == rows[-1] - rows[0] + 1:
            found: Tensor = stored[rows[0] : rows[-1] + 1]
        else:
            found = torch.cat([stored[i : i + 1] for i in rows])
    return found.reshape(len(rows), -1)


def _unpickled(source: Pickled) -> Tensor:
    loaded: Mapping[str, Tensor] = torch.load(
        source.file,
        weights_only=True,
        map_location="cpu",
        # Old files are no zip archives and cannot be mapped.
        mmap=zipfile.is_zipfile(source.file),
    )
    return loaded[source.key].detach()


def _source_rows(ref: TensorRef, rows: Sequence[int]) -> Tensor:
    if not ref.is_contiguous:
        return _viewed(ref).reshape(ref.spec.shape[0], -1)[list(rows)]
    if isinstance(ref.source, Pickled):
        whole = _unpickled(ref.source)
        return whole.reshape(ref.spec.shape[0], -1)[list(rows)]
    return _rows_of(ref.source.file, ref.stored.name, rows)


def _whole(ref: TensorRef) -> Tensor:
    """A small tensor in float64, its view applied."""
    return _viewed(ref).double()


def _viewed(ref: TensorRef) -> Tensor:
    result: Tensor
    if isinstance(ref.source, Pickled):
        result = _unpickled(ref.source)
    else:
        with safe_open(ref.source.file, framework="pt") as handle:
            result = handle.get_tensor(ref.stored.name)
    for step in ref.view:
        match step:
            case Permuted(axes):
                result = torch.permute(result, axes)
            case Narrowed(axis, start, stop):
                result = result.index_select(axis, torch.arange(start, stop))
            case _:
                result = result.reshape(step.shape)
    return result


def _spans(rows: int, columns: int, samples: int | None) -> list[list[int]]:
    """Row numbers to look at, in blocks: all, or some from the first to the last."""
    if samples is not None and rows > samples:
        picked = {round(i * (rows - 1) / max(samples - 1, 1)) for i in range(samples)}
        return [sorted(picked)]
    step = max(1, _BLOCK // max(columns, 1))
    return [list(range(i, min(i + step, rows))) for i in range(0, rows, step)]


def _compare_plain(job: Job, file: Path, samples: int | None, tally: _Tally) -> None:
    """Copies, casts and patched rows are exact, bit for bit."""
    name, shape = job.output.name, job.output.shape
    if 0 in shape:
        return
    if not shape:
        with safe_open(file, framework="pt") as handle:
            same = _same_bits(handle.get_tensor(name).reshape(1, 1), _scalar(job))
        if not same:
            tally.differences.append(f"{name}: its value differs")
        return
    columns = math.prod(shape[1:])
    for rows in _spans(shape[0], columns, samples):
        got = _rows_of(file, name, rows)
        expected = _expected_rows(job, rows, got.dtype)
        tally.compared += got.numel() * got.dtype.itemsize
        if not _same_bits(got, expected):
            wrong = sum(not _same_bits(a, b) for a, b in zip(got, expected, strict=True))
            tally.differences.append(
                f"{name}: {wrong} of {len(rows)} rows differ from their source"
            )


def _scalar(job: Job) -> Tensor:
    assert isinstance(job.op, Copy | Cast)
    return _whole(job.op.source).reshape(1, 1)


def _expected_rows(job: Job, rows: Sequence[int], kind: torch.dtype) -> Tensor:
    match job.op:
        case Copy(source) | Cast(source):
            return _source_rows(source, rows).to(kind)
        case PatchRows(base, patch):
            expected = _source_rows(base, rows).to(kind, copy=True)
            trained = _whole(patch.rows)
            for i, index in enumerate(patch.indices):
                if index in rows:
                    expected[rows.index(index)] = trained[i].to(kind)
            return expected
        case Merge() | ScaleBias():
            raise AssertionError(job)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype is not b.dtype:
        # A scalar that came through float64.
        return bool((a == b.to(a.dtype)).all())
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def _compare_merge(
    job: Job, op: Merge, file: Path, samples: int | None, tolerance: float, tally: _Tally
) -> None:
    name, (count, columns) = job.output.name, op.base.spec.shape
    norms = {
        id(piece): _column_norms(op.base, piece.module)
        for piece in op.pieces
        if _needs_columns(piece)
    }
    wrong = 0
    for rows in _spans(count, columns, samples):
        base = _source_rows(op.base, rows).double()
        exact = base.clone()
        for piece in op.pieces:
            inside = [i for i, row in enumerate(rows) if piece.start <= row < piece.stop]
            if inside:
                module_rows = [rows[i] - piece.start + piece.offset for i in inside]
                exact[inside] = _exact(
                    base[inside], piece.module, module_rows, norms.get(id(piece))
                )
        got = _rows_of(file, name, rows)
        wrong += _compare(got, exact, base, tolerance, tally)
        tally.rows += len(rows)
    tally.modules |= {piece.module.path for piece in op.pieces}
    if wrong:
        tally.differences.append(f"{name}: {wrong} values are not the recomputed ones")


def _exact(base: Tensor, module: DoraModule, rows: Sequence[int], norms: Tensor | None) -> Tensor:
    """The paper's formula on some rows, in float64."""
    direction = base
    if module.delta is not None:
        up, down = _whole(module.delta.up)[list(rows)], _whole(module.delta.down)
        direction = base + module.scaling * (up @ down)
    if module.magnitude is None:
        return direction
    magnitude = _whole(module.magnitude)
    if module.magnitude_is is MagnitudeKind.FACTOR:
        by_row = module.axis is MagnitudeAxis.OUT
        return direction * (magnitude[list(rows)].unsqueeze(1) if by_row else magnitude)
    if norms is not None:
        return torch.where(norms > 0, magnitude * direction / norms, torch.zeros_like(direction))
    length = direction.square().sum(dim=1, keepdim=True).sqrt()
    scaled = magnitude[list(rows)].unsqueeze(1) * direction / length
    return torch.where(length > 0, scaled, torch.zeros_like(direction))


def _needs_columns(piece: Piece) -> bool:
    module = piece.module
    return (
        module.axis is MagnitudeAxis.IN
        and module.magnitude is not None
        and module.magnitude_is is MagnitudeKind.NORM
    )


def _compare_bias(job: Job, op: ScaleBias, file: Path, tolerance: float, tally: _Tally) -> None:
    """All of a scaled bias: it is short, though its norms take a pass over the weight."""
    name = job.output.name
    exact = _whole(op.source)
    for piece in op.pieces:
        module = piece.module
        assert module.magnitude is not None
        magnitude, by_row = _whole(module.magnitude), module.axis is MagnitudeAxis.OUT
        span = slice(piece.start, piece.stop) if by_row else slice(None)
        if by_row:
            magnitude = magnitude[piece.offset : piece.offset + piece.stop - piece.start]
        if module.magnitude_is is MagnitudeKind.NORM:
            length = _row_norms(op.base, piece) if by_row else _column_norms(op.base, module)
            magnitude = torch.where(length > 0, magnitude / length, torch.zeros_like(length))
        exact[span] *= magnitude
    got = _rows_of(file, name, range(len(exact))).view(1, -1)
    exact = exact.view(1, -1)
    if _compare(got, exact, exact, tolerance, _Tally()):
        tally.differences.append(f"{name}: the bias is not the recomputed one")
    tally.compared += got.numel() * got.dtype.itemsize


def _row_norms(base: TensorRef, piece: Piece) -> Tensor:
    norms = []
    for block in _spans(piece.stop - piece.start, base.spec.shape[1], None):
        direction = _source_rows(base, [piece.start + i for i in block]).double()
        if piece.module.delta is not None:
            delta = piece.module.delta
            up, down = _whole(delta.up)[[piece.offset + i for i in block]], _whole(delta.down)
            direction = direction + piece.module.scaling * (up @ down)
        norms.append(direction.square().sum(dim=1).sqrt())
    return torch.cat(norms)


def _column_norms(base: TensorRef, module: DoraModule) -> Tensor:
    total = torch.zeros(base.spec.shape[1], dtype=torch.float64)
    for rows in _spans(base.spec.shape[0], base.spec.shape[1], None):
        direction = _source_rows(base, rows).double()
        if module.delta is not None:
            up, down = _whole(module.delta.up)[rows], _whole(module.delta.down)
            direction = direction + module.scaling * (up @ down)
        total += direction.square().sum(dim=0)
    return total.sqrt()


def _compare(got: Tensor, exact: Tensor, base: Tensor, tolerance: float, tally: _Tally) -> int:
    """Number of elements off by more than `tolerance` units in the last place."""
    rounded = exact.to(got.dtype)
    info = torch.finfo(got.dtype)
    # Float32 sums of a row are good to a few times 1e-7 of its largest element, no further.
    slack = exact.abs().amax(dim=1, keepdim=True) * 2e-7 if info.bits == 16 else 1e-14
    limit = tolerance * info.eps * exact.abs() + info.tiny + slack
    value = got.double()
    tally.elements += got.numel()
    tally.off += int((got != rounded).sum())
    tally.noise += float((value - exact).square().sum())
    tally.effect += float((exact - base).square().sum())
    tally.kept += float(((value - base) * (exact - base)).sum())
    return int((~((value - exact).abs() <= limit)).sum())
