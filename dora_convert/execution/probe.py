"""Looking at data before anything is written: sound numbers, and is it the right base at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_convert.core.adapter import Adapter, DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Merge, Plan
from dora_convert.core.tensors import Reshaped, TensorRef
from dora_convert.execution.sampling import runs, spread, taken
from dora_convert.execution.threads import in_threads
from dora_convert.storage.reader import Reader

__all__ = ["Fingerprint", "copy_differences", "fingerprint", "nonfinite"]

_BLOCK = 8 << 20
_MODULES = 48
_ROWS = 32


def nonfinite(adapter: Adapter, reader: Reader, *, workers: int) -> list[str]:
    """A line for each adapter tensor that holds NaN or infinity."""
    counts: dict[str, tuple[int, int]] = {}

    def count(ref: TensorRef) -> None:
        bad = sum(map(_bad_values, _blocks(ref, reader)))
        if bad:
            counts[ref.stored.name] = bad, ref.stored.numel

    in_threads(list(_tensors(adapter)), count, workers)
    return [
        f"{name}: {n} of {of} values are NaN or Inf" for name, (n, of) in sorted(counts.items())
    ]


def _bad_values(block: Tensor) -> int:
    # One NaN or Inf makes the sum one; the sum alone is several times cheaper than the count.
    if bool(torch.isfinite(block.sum(dtype=torch.float64))):
        return 0
    return int((~torch.isfinite(block)).sum())


def _tensors(adapter: Adapter) -> Iterable[TensorRef]:
    for module in adapter.modules.values():
        if module.delta is not None:
            yield from module.delta.tensors
        if module.magnitude is not None:
            yield module.magnitude
    yield from adapter.replaced.values()
    for patch in adapter.token_rows.values():
        yield patch.rows


def _blocks(ref: TensorRef, reader: Reader) -> Iterable[Tensor]:
    size = ref.stored.dtype.bits // 8
    count = ref.stored.numel
    flat = TensorRef(ref.stored, ref.source, ref.stored, (Reshaped((count, 1)),)).reshaped(count, 1)
    buffer = torch.empty(min(_BLOCK, max(count * size, 1)), dtype=torch.uint8)
    with reader.rows(flat) as rows:
        for start, stop in rows.spans(0, count, _BLOCK):
            yield rows.read(start, stop, buffer)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """How well the magnitudes sit on the base's norms: DoRA starts at `m = ||W||` and stays near.

    `deviation`: median |log(m / ||W||)|. `correlation`: of log m with log ||W|| within modules.
    `spread`: standard deviation of log ||W|| within modules; where it is tiny, the correlation
    says nothing.
    """

    rows: int
    deviation: float
    correlation: float
    spread: float

    @property
    def is_doubtful(self) -> bool:
        """Whether a base of the right shape is probably not the one that was trained on.

        A real training moves magnitudes by a few percent; other weights are off by more, or
        their rows are long where others are short.
        """
        return self.deviation > 0.25 or (self.spread > 0.03 and self.correlation < 0.3)


def fingerprint(plan: Plan, reader: Reader, *, workers: int) -> Fingerprint | None:
    """Sampled over modules and rows; None where no module has a magnitude per output row."""
    pairs = [
        (op.base, piece.module, piece.start, piece.offset, piece.stop - piece.start)
        for op in (job.op for job in plan.jobs)
        if isinstance(op, Merge)
        for piece in op.pieces
        if piece.module.axis is MagnitudeAxis.OUT
        and piece.module.magnitude is not None
        and piece.module.magnitude_is is MagnitudeKind.NORM
    ]
    chosen = spread(pairs, _MODULES)
    logs: list[tuple[Tensor, Tensor]] = []

    def compare(pair: tuple[TensorRef, DoraModule, int, int, int]) -> None:
        base, module, start, offset, count = pair
        picked = runs(count, _ROWS)
        norms = torch.linalg.vector_norm(_rows(base, picked, reader, start), dim=1)
        assert module.magnitude is not None
        magnitude = taken(reader.load(module.magnitude)[offset:], picked).double().abs()
        used = (norms > 0) & (magnitude > 0)
        if int(used.sum()) > 1:
            logs.append((magnitude[used].log(), norms[used].log()))

    in_threads(chosen, compare, workers)
    if not logs:
        return None
    difference = torch.cat([m - n for m, n in logs])
    m = torch.cat([m - m.mean() for m, _ in logs])
    n = torch.cat([n - n.mean() for _, n in logs])
    denominator = math.sqrt(float(m.square().sum()) * float(n.square().sum()))
    return Fingerprint(
        rows=len(difference),
        deviation=float(difference.abs().median()),
        correlation=float((m * n).sum()) / denominator if denominator else 1.0,
        spread=float(n.square().mean().sqrt()),
    )


def copy_differences(
    modules: Iterable[DoraModule], bases: Mapping[str, TensorRef], reader: Reader
) -> list[str]:
    """Paths of modules whose own copy of the base weight is not what the base holds.

    `bases` gives the stored weight by module path. Rows are sampled, and compared to the
    precision of the coarser of the two types.
    """
    different = []
    for module in modules:
        if module.weight is None or module.path not in bases:
            continue
        copy, base = module.weight, bases[module.path]
        rows = runs(min(copy.spec.shape[0], base.spec.shape[0]), _ROWS)
        mine, theirs = _rows(copy, rows, reader), _rows(base, rows, reader)
        scale = theirs.abs().amax()
        if bool(((mine - theirs).abs() > 0.01 * theirs.abs() + 1e-3 * scale).any()):
            different.append(module.path)
    return different


def _rows(ref: TensorRef, rows: Sequence[range], reader: Reader, first: int = 0) -> Tensor:
    """These rows, counted from `first`; float64."""
    matrix, found = ref.matrix(), []
    with reader.rows(matrix) as blocks:
        for run in rows:
            buffer = torch.empty(matrix.spec.row_bytes * len(run), dtype=torch.uint8)
            found.append(blocks.read(first + run.start, first + run.stop, buffer).double())
    return torch.cat(found)
