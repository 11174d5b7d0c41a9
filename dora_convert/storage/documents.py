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

_LIMIT = 16 << 20


def read_json(file: Path, *, limit: int = _LIMIT) -> Json:
    """Read the JSON object in `file`.

    NaN and Infinity are taken, for trainers write them; whoever uses a number checks it.
    """
    text = read_text(file, limit=limit)
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        what = f"{file.name} gives the key {quoted(error.key)} twice, so its meaning is open"
        raise InputError(what, where=str(file), hint="Delete one of the two.") from error
    except json.JSONDecodeError as error:
        what = f"{file.name} is not valid JSON: {error.msg} (line {error.lineno})"
        raise InputError(what, where=str(file)) from error
    except RecursionError as error:
        raise InputError(f"{file.name} is nested too deeply", where=str(file)) from error
    except ValueError as error:  # a number of more digits than Python converts
        what = f"{file.name} is not valid JSON: a number is too long"
        raise InputError(what, where=str(file)) from error
    if not isinstance(value, dict):
        raise InputError(f"{file.name} must hold a JSON object", where=str(file))
    return value


def read_text(file: Path, *, limit: int) -> str:
    """Read a text of at most `limit` bytes."""
    with opened(file) as (fd, size):
        if size > limit:
            what = f"{file.name} is too large for such a document: {size} bytes, at most {limit}"
            raise InputError(what, where=str(file))
        raw = pread_exactly(fd, file, length=size, offset=0)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name} is not UTF-8 text", where=str(file)) from error


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
