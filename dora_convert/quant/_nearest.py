"""Which of a few values lies nearest: looked up, where a search would take ten times as long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Nearest"]

_BINS = 4096


class Nearest:
    """Indices into `values`, which lie from -1 to 1; of two equally near the lower value.

    The interval is cut into bins so narrow that at most one middle between two neighbours lies in
    each: a bin has the index below its middle, and one comparison decides.
    """

    def __init__(self, values: Sequence[float]) -> None:
        table = torch.tensor(values)
        order = torch.argsort(table, stable=True)
        middles = (table[order[:-1]] + table[order[1:]]) / 2
        bins = _bins(middles)
        assert bool((bins[1:] > bins[:-1]).all())
        ranks = torch.bucketize(torch.arange(_BINS + 1, dtype=torch.int32), bins)
        limits = torch.full((_BINS + 1,), torch.inf).index_put_((bins,), middles)
        indices = order.to(torch.uint8)
        self._limits = limits
        self._below = indices[ranks]
        # What is added, modulo 256, above the middle of a bin.
        self._step = indices[torch.clamp(ranks + 1, max=len(values) - 1)] - self._below

    def indices(self, scaled: Tensor) -> Tensor:
        """Of every element of `scaled`, float32 from -1 to 1: uint8 `[n]`."""
        flat = scaled.view(-1)
        bins = _bins(flat)
        limits, step, below = (
            table.to(flat.device, non_blocking=True)
            for table in (self._limits, self._step, self._below)
        )
        above = flat > limits.index_select(0, bins)
        return step.index_select(0, bins).mul_(above).add_(below.index_select(0, bins))


def _bins(values: Tensor) -> Tensor:
    """Rising with the value, in float32's rounding too; what is not a number has one as well."""
    return ((values + 1) * (_BINS / 2)).to(torch.int32).clamp_(0, _BINS)
