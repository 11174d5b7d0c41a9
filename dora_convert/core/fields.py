"""Reading a config with suspicion: every value checked, every fault collected with its key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dora_convert.core.bundle import Json

__all__ = ["Fields"]

_MOST = 2**31  # ranks and lengths; what is larger is not meant


class Fields:
    """Typed access to one JSON object; what is wrong goes into `problems`, not into exceptions.

    A bad value yields the default, so that reading can go on and find the next fault.
    """

    def __init__(self, data: Json, file: str, problems: list[str]) -> None:
        self._data = data
        self._file = file
        self._problems = problems

    def reject(self, key: str, why: str) -> None:
        """Record that the value of `key` cannot be used."""
        self._problems.append(f"{self._file}: {key!r} {why}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null, false or empty."""
        return bool(self._data.get(key))

    def flag(self, key: str) -> bool:
        """A boolean; absent and null mean false."""
        value = self._data.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.reject(key, f"must be true or false, not {value!r:.60}")
        return False

    def text(self, key: str) -> str | None:
        """A string, or None where absent or null."""
        value = self._data.get(key)
        if value is None or isinstance(value, str):
            return value
        self.reject(key, f"must be a string, not {value!r:.60}")
        return None

    def count(self, key: str, default: int) -> int:
        """A whole number of at least 1."""
        return self._count(key, self._data.get(key), default)

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return self._number(key, self._data.get(key), default)

    def counts(self, key: str) -> Mapping[str, int]:
        """A mapping of strings to whole numbers of at least 1."""
        return {k: self._count(_entry(key, k), v, 1) for k, v in self._mapping(key).items()}

    def numbers(self, key: str) -> Mapping[str, float]:
        """A mapping of strings to finite numbers."""
        return {k: self._number(_entry(key, k), v, 1.0) for k, v in self._mapping(key).items()}

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; absent and null mean none, a single string means itself."""
        value = self._data.get(key)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if isinstance(value, Sequence) and all(isinstance(v, str) for v in value):
            return tuple(value)
        self.reject(key, f"must be a list of strings, not {value!r:.60}")
        return ()

    def _mapping(self, key: str) -> Json:
        value = self._data.get(key)
        if value is None:
            return {}
        if isinstance(value, dict):
            return value
        self.reject(key, f"must be an object, not {value!r:.60}")
        return {}

    def _count(self, key: str, value: object, default: int) -> int:
        if value is None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            if value <= _MOST:
                return value
            self.reject(key, "is too large")
            return default
        self.reject(key, f"must be a whole number of at least 1, not {value!r:.60}")
        return default

    def _number(self, key: str, value: object, default: float) -> float:
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            # int before float: float() of a huge integer would raise.
            if isinstance(value, int) and abs(value) > 10**30:
                self.reject(key, "is too large")
                return default
            if math.isfinite(value):
                return float(value)
        self.reject(key, f"must be a finite number, not {value!r:.60}")
        return default


def _entry(key: str, name: str) -> str:
    return f"{key}[{name!r:.80}]"
