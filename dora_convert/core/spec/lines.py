"""On which line of a TOML text a key stands; the standard parser does not say."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

__all__ = ["KeyPath", "line_of", "lines_of_keys"]

KeyPath: TypeAlias = tuple[str | int, ...]

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}'
    r'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}=\n]',
    re.DOTALL,
)


def lines_of_keys(text: str) -> Mapping[KeyPath, int]:
    """The line of every header and key of a text that is known to be TOML.

    Tables of an array are numbered. What is written within one value has the line of its key.
    """
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for line, statement, equals in _statements(text):
        if equals is not None:
            path = table + _keys(statement[:equals] + "=0")
        else:
            path = ()
            for key in _keys(statement):
                path += (key,)
                path += (counts[path] - 1,) if path in counts else ()
            if statement.startswith("[["):
                array = path[:-1] if isinstance(path[-1], int) else path
                counts[array] = counts.get(array, 0) + 1
                path = (*array, counts[array] - 1)
            table = path
        for length in range(1, len(path) + 1):
            lines.setdefault(path[:length], line)
    return lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of a key, or of the nearest thing around it."""
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)


def _statements(text: str) -> Iterator[tuple[int, str, int | None]]:
    """Line, text and place of the first `=` of each statement: a header, or a key and its value."""
    start, depth, equals = 0, 0, None
    line = 1
    for found in _TOKEN.finditer(text + "\n"):
        token = found[0]
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
        elif token == "=" and not depth and equals is None:
            equals = found.start()
        elif token == "\n" and not depth:
            raw = text[start : found.start()]
            statement = raw.lstrip()
            if statement and not statement.startswith("#"):
                at = start + len(raw) - len(statement)
                yield line, statement.rstrip(), None if equals is None else equals - at
            line += raw.count("\n") + 1
            start, equals = found.end(), None


def _keys(statement: str) -> tuple[str, ...]:
    """The keys of a header or of `a.b.c = 0`; the parser itself knows how they are quoted."""
    found: list[str] = []
    value: Any = tomllib.loads(statement)
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        found.append(key)
        value = value[0] if isinstance(value, list) else value
    return tuple(found)
