"""Which modules and which of their rows are looked at, where looking at all is too much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["runs", "spread", "taken"]

T = TypeVar("T")

_RUN = 8


def spread(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of them, at equal distances."""
    return items[:: max(1, math.ceil(len(items) / count))]


def runs(count: int, wanted: int) -> list[range]:
    """At most `wanted` row numbers of `count`, from the first to the last, in some stretches.

    One read, or one request to the Hub, brings a stretch.
    """
    if count <= wanted:
        return [range(count)]
    starts = torch.linspace(0, count - _RUN, wanted // _RUN).round().long().tolist()
    return [range(start, start + _RUN) for start in starts]


def taken(tensor: Tensor, rows: Sequence[range]) -> Tensor:
    """These rows of it, one after the other."""
    return torch.cat([tensor[run.start : run.stop] for run in rows])
