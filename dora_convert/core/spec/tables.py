"""Typed access to the tables of a description; every fault is kept with its line and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from dora_convert.core.spec.lines import KeyPath, line_of
from dora_convert.core.spec.names import NamePattern

__all__ = ["Faults", "Table"]


class Faults:
    """What is wrong so far, by line."""

    def __init__(self, lines: Mapping[KeyPath, int]) -> None:
        self._lines = lines
        self._found: list[tuple[int, str]] = []

    def add(self, path: KeyPath, why: str) -> None:
        """Record what is wrong with the value at `path`."""
        line = line_of(self._lines, path)
        key = ".".join(str(key) for key in path if isinstance(key, str))
        self._found.append((line, f"line {line}: {key or 'the file'} {why}"))

    def messages(self) -> tuple[str, ...]:
        """All of it, in the order of the file."""
        found = dict.fromkeys(sorted(self._found, key=lambda fault: fault[0]))
        return tuple(text for _, text in found)


class Table:
    """One table; a value of a wrong type is recorded, and the default stands in for it."""

    def __init__(self, data: Mapping[str, Any], path: KeyPath, faults: Faults) -> None:
        self.path = path
        self.faults = faults
        self._data = data

    def names(self) -> tuple[str, ...]:
        """Its keys, in the order of the file."""
        return tuple(self._data)

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def reject(self, key: str | None, why: str) -> None:
        """Record a fault of one key, or of the whole table."""
        self.faults.add(self.path if key is None else (*self.path, key), why)

    def only(self, known: Iterable[str]) -> None:
        """Every key must be one of these."""
        names = sorted(known)
        for key in self._data.keys() - names:
            close = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
            self.reject(key, f"is not known here: {hint}")

    def raw(self, key: str) -> Any:
        """Whatever is there."""
        return self._data.get(key)

    def text(self, key: str, default: str = "") -> str:
        """Text that is not empty."""
        value = self._data.get(key, default)
        if isinstance(value, str) and (value or key not in self._data):
            return value
        self.reject(key, f"must be text, not {value!r:.60}")
        return default

    def choice(self, key: str, *names: str) -> str:
        """One of these words; the first where it is absent."""
        value = self._data.get(key, names[0])
        if value in names:
            return str(value)
        self.reject(key, f"must be one of {', '.join(names)}, not {value!r:.60}")
        return names[0]

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._data.get(key, False)
        if not isinstance(value, bool):
            self.reject(key, f"must be true or false, not {value!r:.60}")
        return value is True

    def texts(self, key: str) -> tuple[str, ...]:
        """One text or a list of them."""
        value = self._data.get(key, [])
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(v, str) for v in values):
            return tuple(values)
        self.reject(key, f"must be text or a list of texts, not {value!r:.60}")
        return ()

    def key_or_number(self, key: str) -> float | str | None:
        """The key of a config entry, or a number."""
        value = self._data.get(key)
        if value is None or (isinstance(value, str) and value):
            return value
        # The bound keeps out infinity, and integers that no float holds.
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        self.reject(key, f"must be a number or the key of a config entry, not {value!r:.60}")
        return None

    def pattern(self, key: str, *, needs: str | None = None) -> NamePattern | None:
        """A name with placeholders, of which `needs` must be one."""
        text = self.text(key)
        return self.parsed(key, text, needs=needs) if text else None

    def patterns(self, key: str) -> tuple[NamePattern, ...]:
        """Any number of names with placeholders."""
        parsed = (self.parsed(key, text) for text in self.texts(key))
        return tuple(pattern for pattern in parsed if pattern is not None)

    def parsed(self, key: str, text: str, *, needs: str | None = None) -> NamePattern | None:
        """The pattern that a text of this key is."""
        try:
            pattern = NamePattern.parse(text)
        except ValueError as error:
            self.reject(key, f"({text!r:.80}) {error}")
            return None
        if needs is not None and needs not in pattern.required:
            self.reject(key, f"({text!r:.80}) has no {{{needs}}}")
            return None
        return pattern

    def table(self, key: str) -> Table | None:
        """A table, or None where it is absent."""
        value = self._data.get(key)
        if isinstance(value, dict):
            return Table(value, (*self.path, key), self.faults)
        if value is not None:
            self.reject(key, f"must be a table, not {value!r:.60}")
        return None

    def tables(self, key: str) -> list[Table]:
        """A list of tables; a single one counts."""
        value = self._data.get(key, [])
        values = [value] if isinstance(value, dict) else value
        if isinstance(values, list) and all(isinstance(v, dict) for v in values):
            is_list = isinstance(value, list)
            return [
                Table(v, (*self.path, key, i) if is_list else (*self.path, key), self.faults)
                for i, v in enumerate(values)
            ]
        self.reject(key, f"must be a list of tables, not {value!r:.60}")
        return []
