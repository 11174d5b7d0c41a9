"""What the norms of a base say about an adapter's magnitudes: DoRA starts at `m = ||W||`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dora_convert.core.adapter import DoraModule
from dora_convert.core.tensors import TensorRef

__all__ = ["Moments", "Sample", "Stretch", "Subject", "fits_better"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows `start:stop` of a stored matrix."""

    base: TensorRef
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Subject:
    """A module with a magnitude, and its weight: stored rows, one stretch after the other.

    `is_transposed`: the weight is stored `[in, out]`.
    """

    module: DoraModule
    weight: tuple[Stretch, ...]
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of log m and log norm about their means within each module."""

    count: int = 0
    magnitude: float = 0.0
    norm: float = 0.0
    mixed: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.magnitude + other.magnitude,
            self.norm + other.norm,
            self.mixed + other.mixed,
        )

    @property
    def correlation(self) -> float:
        """Pearson's, over all modules together; 0 where one side does not vary."""
        scale = math.sqrt(self.magnitude * self.norm)
        return self.mixed / scale if scale else 0.0

    @property
    def slope(self) -> float:
        """How much of a longer row a magnitude takes over: 1 if it is a length; 0 if all is one."""
        return self.mixed / self.norm if self.norm else 0.0

    @property
    def noise(self) -> float:
        """Three standard deviations of the correlation of unrelated numbers."""
        return 3 / math.sqrt(max(self.count, 1))


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of one module.

    `ratio`: median of m / ||W||. `change`: the largest |m / ||W|| - 1|. `level`: median of m.
    `spread`: standard deviation of log m. `from_one` and `from_norm`: mean squares of log m and of
    log (m / ||W||).
    """

    subject: Subject
    ratio: float
    change: float
    level: float
    spread: float
    from_one: float
    from_norm: float
    moments: Moments


def fits_better(one: Moments, other: Moments) -> bool:
    """Whether `one` correlates beyond noise, and beyond noise better than `other`."""
    noise = max(one.noise, other.noise)
    return one.correlation > noise and one.correlation - other.correlation > noise
