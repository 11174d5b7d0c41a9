"""Measuring magnitudes against the base's norms, for `planning.settle` to decide by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dora_convert.core.adapter import MagnitudeAxis, RowOrder
from dora_convert.core.evidence import Moments, Sample, Stretch, Subject
from dora_convert.core.heads import reordered
from dora_convert.core.tensors import TensorRef
from dora_convert.execution.sampling import runs, spread, taken
from dora_convert.execution.threads import in_threads
from dora_convert.storage.reader import Reader

__all__ = ["axis_moments", "order_moments", "sampled_rows", "samples"]

T = TypeVar("T")

_BLOCK = 8 << 20
_ROWS = 32
_SAMPLED = 48  # modules of which some rows are read
_WHOLE = 8  # modules that are read whole


def samples(subjects: Sequence[Subject], reader: Reader, *, workers: int) -> list[Sample]:
    """Some rows of some modules; `subjects` have a magnitude per row of the stored weight."""
    found: list[Sample] = []

    def measure(subject: Subject) -> None:
        sample = _sample(subject, reader)
        if sample is not None:
            found.append(sample)

    in_threads(spread(subjects, _SAMPLED), measure, workers)
    return sorted(found, key=lambda sample: sample.subject.module.path)


def sampled_rows(subjects: Sequence[Subject]) -> Iterator[tuple[TensorRef, int, int]]:
    """What `samples` will read of the weights: rows `start:stop`."""
    for subject in spread(subjects, _SAMPLED):
        magnitude = subject.module.magnitude
        assert magnitude is not None
        for run in runs(magnitude.spec.numel, _ROWS):
            for part, rows in _stretches(subject.weight, run):
                yield part.base, rows.start, rows.stop


def axis_moments(
    subjects: Sequence[Subject], reader: Reader, *, workers: int
) -> dict[MagnitudeAxis, Moments]:
    """How the magnitudes of square modules go with the norms of rows, and of columns."""

    def measure(subject: Subject) -> dict[MagnitudeAxis, Moments]:
        rows, columns = _norms(subject, reader)
        if subject.is_transposed:
            rows, columns = columns, rows
        m = _magnitude(subject.module.magnitude, reader)
        return {MagnitudeAxis.OUT: _moments(m, rows), MagnitudeAxis.IN: _moments(m, columns)}

    return _pooled(subjects, measure, workers)


def order_moments(
    subjects: Sequence[Subject], dim: int, reader: Reader, *, workers: int
) -> dict[RowOrder, Moments]:
    """How the magnitudes go with the norms of rows when taken for each order.

    `dim` is the rows of a head.
    """

    def measure(subject: Subject) -> dict[RowOrder, Moments]:
        rows, _ = _norms(subject, reader)
        stored = subject.module.magnitude
        assert stored is not None
        return {
            order: _moments(_magnitude(reordered(stored, order, dim), reader), rows)
            for order in RowOrder
        }

    return _pooled(subjects, measure, workers)


def _pooled(
    subjects: Sequence[Subject], measure: Callable[[Subject], dict[T, Moments]], workers: int
) -> dict[T, Moments]:
    parts: list[dict[T, Moments]] = []
    in_threads(spread(subjects, _WHOLE), lambda subject: parts.append(measure(subject)), workers)
    found: dict[T, Moments] = {}
    for part in parts:
        for key, moments in part.items():
            found[key] = found.get(key, Moments()) + moments
    return found


def _sample(subject: Subject, reader: Reader) -> Sample | None:
    m = _magnitude(subject.module.magnitude, reader)
    picked = runs(len(m), _ROWS)
    norms = torch.cat([_norms_of(subject.weight, run, reader) for run in picked])
    m = taken(m, picked)
    used = (m > 0) & (norms > 0)
    if int(used.sum()) < 2:
        return None
    m, norms = m[used], norms[used]
    ratio = m / norms
    return Sample(
        subject,
        ratio=float(ratio.median()),
        change=float((ratio - 1).abs().max()),
        level=float(m.median()),
        spread=float(m.log().std()),
        from_one=float(m.log().square().mean()),
        from_norm=float(ratio.log().square().mean()),
        moments=_moments(m, norms),
    )


def _moments(magnitude: Tensor, norms: Tensor) -> Moments:
    used = (magnitude > 0) & (norms > 0) & torch.isfinite(magnitude) & torch.isfinite(norms)
    if int(used.sum()) < 2:
        return Moments()
    m, n = magnitude[used].log(), norms[used].log()
    m, n = m - m.mean(), n - n.mean()
    return Moments(len(m), float(m.square().sum()), float(n.square().sum()), float((m * n).sum()))


def _magnitude(ref: TensorRef | None, reader: Reader) -> Tensor:
    assert ref is not None
    # A sign turns the row over; the length is what sits on the norm.
    return reader.load(ref).double().abs()


def _stretches(weight: Sequence[Stretch], run: range) -> Iterator[tuple[Stretch, range]]:
    """Where the rows of a module lie: in which tensors, and in which rows of each."""
    offset = 0
    for part in weight:
        shift = part.start - offset
        rows = range(max(run.start + shift, part.start), min(run.stop + shift, part.stop))
        if rows:
            yield part, rows
        offset += part.stop - part.start


def _norms_of(weight: Sequence[Stretch], run: range, reader: Reader) -> Tensor:
    norms = []
    for part, rows in _stretches(weight, run):
        buffer = torch.empty(part.base.spec.row_bytes * len(rows), dtype=torch.uint8)
        with reader.rows(part.base) as blocks:
            block = blocks.read(rows.start, rows.stop, buffer).double()
            norms.append(block.flatten(1).norm(dim=1))
    return torch.cat(norms) if norms else torch.zeros(0, dtype=torch.float64)


def _norms(subject: Subject, reader: Reader) -> tuple[Tensor, Tensor]:
    """Of all stored rows, and of all columns."""
    rows = []
    columns = torch.zeros(subject.weight[0].base.spec.shape[1], dtype=torch.float64)
    for part in subject.weight:
        buffer = torch.empty(max(_BLOCK, part.base.spec.row_bytes), dtype=torch.uint8)
        with reader.rows(part.base) as blocks:
            for start, stop in blocks.spans(part.start, part.stop, _BLOCK):
                block = blocks.read(start, stop, buffer).double().square()
                rows.append(block.sum(dim=1).sqrt())
                columns += block.sum(dim=0)
    return torch.cat(rows), columns.sqrt()
