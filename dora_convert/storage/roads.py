"""Which of two ways to do the same costs less here, found out by taking both."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

__all__ = ["Roads"]

_RECENT = 8  # so many times are remembered of each
_AGAIN = 64  # one in so many goes the dearer way, in case that has changed


class Roads:
    """Two roads, 0 and 1, and the seconds that a byte lately cost on each; for any thread.

    `first` and `second` make one figure of what is remembered.
    """

    def __init__(
        self, first: Callable[[Sequence[float]], float], second: Callable[[Sequence[float]], float]
    ) -> None:
        self._figures = first, second
        self._costs: tuple[deque[float], ...] = deque(maxlen=_RECENT), deque(maxlen=_RECENT)
        self._asked = 0
        self._lock = threading.Lock()

    def next(self) -> int:
        """The road to take now."""
        with self._lock:
            self._asked += 1
            if self._asked <= 2 * _RECENT or not all(self._costs):
                return self._asked % 2
            return (1 - self._cheaper()) if self._asked % _AGAIN == 0 else self._cheaper()

    def took(self, road: int, seconds: float, nbytes: int) -> None:
        """So many bytes went that way."""
        with self._lock:
            self._costs[road].append(seconds / nbytes)

    def seconds(self, nbytes: int) -> float:
        """What so many bytes will cost; 0 as long as that is not known."""
        with self._lock:
            return min(map(self._cost, (0, 1))) * nbytes if all(self._costs) else 0.0

    def _cheaper(self) -> int:
        return int(self._cost(1) < self._cost(0))

    def _cost(self, road: int) -> float:
        return self._figures[road](self._costs[road])
