"""Which modules and which of their rows are looked at, where looking at all is too much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["indices", "spread"]

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of them, at equal distances."""
    return items[:: max(1, math.ceil(len(items) / count))]


def indices(count: int, wanted: int) -> Tensor:
    """Row numbers from the first of `count` to the last, at most `wanted`, int64."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()
