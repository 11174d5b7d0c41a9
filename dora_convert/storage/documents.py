"""JSON documents beside the tensors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dora_convert.core.bundle import Json
from dora_convert.errors import InputError
from dora_convert.storage.opening import opened, pread_exactly, quoted

__all__ = ["read_json", "read_text"]

_LIMIT = 4 << 20
# What is parsed takes up to 25 times as much memory as its text; an index of so many tensors is
# larger than any, and takes 150 MB.
_MAX_VALUES = 400_000
_MAX_DEPTH = 100
_WIDE = 8 << 20


def read_json(file: Path, *, limit: int = _LIMIT) -> Json:
    """Read the JSON object in `file`.

    NaN and Infinity are taken, for trainers write them; whoever uses a number checks it.
    """
    text = read_text(file, limit=limit)
    if sum(map(text.count, ",[{")) > _MAX_VALUES:
        raise InputError(f"{file.name} holds more than {_MAX_VALUES} values", where=str(file))
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        what = f"{file.name} gives the key {quoted(error.key)} twice, so its meaning is open"
        raise InputError(what, where=str(file), hint="Delete one of the two.") from error
    except json.JSONDecodeError as error:
        what = f"{file.name} is not valid JSON: {error.msg} (line {error.lineno})"
        raise InputError(what, where=str(file)) from error
    except RecursionError as error:
        raise _too_deep(file) from error
    except ValueError as error:  # a number of more digits than Python converts
        what = f"{file.name} is not valid JSON: a number is too long"
        raise InputError(what, where=str(file)) from error
    if not isinstance(value, dict):
        raise InputError(f"{file.name} must hold a JSON object", where=str(file))
    if _is_deep(value):
        raise _too_deep(file)
    return value


def read_text(file: Path, *, limit: int) -> str:
    """Read a text of at most `limit` bytes; a very large one must be ASCII.

    One character outside of it makes all of the text two or four times as large in memory.
    """
    with opened(file) as (fd, size):
        if size > limit:
            what = f"{file.name} is too large for such a document: {size} bytes, at most {limit}"
            raise InputError(what, where=str(file))
        raw = pread_exactly(fd, file, length=size, offset=0)
    if size > _WIDE and (not raw.isascii() or b"\\u" in raw):
        what = f"{file.name} is too large for such a document that is not ASCII: {size} bytes"
        raise InputError(what, where=str(file))
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name} is not UTF-8 text", where=str(file)) from error


def _is_deep(value: Json) -> bool:
    """Whether showing or comparing it could come to Python's limit of recursion."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def _too_deep(file: Path) -> InputError:
    return InputError(f"{file.name} is nested too deeply", where=str(file))


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKeyError(counts.most_common(1)[0][0])
    return value
