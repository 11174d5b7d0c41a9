"""Between reading and planning: what only the base decides about an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from dora_convert.api.bases import fetch_rows
from dora_convert.api.reading import worker_count
from dora_convert.core.adapter import Adapter, BiasRule, MagnitudeAxis, MagnitudeKind, RowOrder
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.evidence import Subject
from dora_convert.planning.components import placed
from dora_convert.planning.doubts import without_doubts
from dora_convert.planning.roworder import head_rows, in_base_order, unclear
from dora_convert.planning.settle import squares, subjects, with_axis, with_bias_rule

__all__ = ["settled"]


def settled(
    adapter: Adapter,
    checkpoint: Checkpoint,
    *,
    transposed: Sequence[str] = (),
    ahead: bool = True,
) -> Adapter:
    """The adapter with axis, row orders, bias rule and kind of magnitude as the base has them.

    All that the adapter's modules stand for is fetched `ahead`, since most commands go on to read
    it. Reads some rows of the base, and whole weights of a few modules where the rows do not do.
    Raises MismatchError where the base does not decide, or shows that nothing can be made of the
    magnitudes.
    """
    from dora_convert.execution.decoding import open_reader
    from dora_convert.execution.settle import (
        axis_moments,
        order_moments,
        sampled_rows,
        samples,
    )

    adapter = placed(adapter, checkpoint)
    reader, workers = open_reader(), worker_count(None)
    found = subjects(adapter, checkpoint, transposed=transposed)
    if ahead:
        fetch_rows((part.base, part.start, part.stop) for s in found for part in s.weight)
    given = adapter
    if adapter.is_axis_open:
        moments = axis_moments(squares(found), reader, workers=workers)
        adapter = with_axis(adapter, moments)
    adapter = with_bias_rule(adapter, checkpoint, BiasRule.KEEP)
    if adapter is not given:
        found = subjects(adapter, checkpoint, transposed=transposed)
    by_row = [s for s in found if _is_norm_by_row(s)]
    in_order = [s for s in by_row if _is_in_order(s)]
    if not ahead:
        rows = sampled_rows(in_order)
        fetch_rows((ref, i, j) for ref, i, j in rows if ref.row_span(i, j) is not None)
    seen = samples(in_order, reader, workers=workers)
    dim = head_rows(checkpoint.config)
    evidence = {}
    if dim is not None:
        asked = unclear(by_row, seen, dim)
        evidence = order_moments(asked, dim, reader, workers=workers)
    adapter = in_base_order(adapter, checkpoint.config, evidence)
    return without_doubts(adapter, checkpoint.config, seen)


def _is_norm_by_row(subject: Subject) -> bool:
    module = subject.module
    is_norm = module.magnitude_is is MagnitudeKind.NORM
    return is_norm and module.axis is MagnitudeAxis.OUT and not subject.is_transposed


def _is_in_order(subject: Subject) -> bool:
    return subject.module.magnitude_order is RowOrder.SAME
