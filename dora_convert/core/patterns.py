"""Matching module paths with patterns that come out of a file and may be hostile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from dora_convert.errors import InputError

__all__ = ["first_matches"]

# Without repetition or choice there is nothing to try twice: such an expression can run here.
_REPEATS = re.compile(r"[*+?{|]")

# Others run in a child that can be stopped: CPython cannot interrupt its own matcher.
_SECONDS = 5.0
_CHILD = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
for p in patterns:
    compiled = re.compile(p)
    print(json.dumps([i for i, s in enumerate(paths) if compiled.match(s)]), flush=True)
"""


def first_matches(keys: Iterable[str], paths: Sequence[str], *, where: str) -> dict[str, str]:
    """For each path the first key, in order, that matches it; paths without one are left out.

    A key matches as PEFT's `rank_pattern` does: as a regular expression that must reach the
    path's end and begin at its start or after a dot (peft/utils/other.py, `get_pattern_key`).

    Raises InputError for a key that is no regular expression, or that takes seconds to match.
    """
    keys = list(keys)
    compiled = [(key, _compile(key, where)) for key in keys]
    slow = _match_slow([key for key in keys if _REPEATS.search(key)], paths, where)
    found: dict[str, str] = {}
    for path in paths:
        for key, pattern in compiled:
            if path in slow[key] if key in slow else pattern.match(path):
                found[path] = key
                break
    return found


def _anchored(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _compile(key: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(_anchored(key))
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"the pattern {key!r:.80} is not a regular expression: {error}", where=where
        ) from error


def _match_slow(keys: list[str], paths: Sequence[str], where: str) -> dict[str, set[str]]:
    if not keys:
        return {}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([[_anchored(key) for key in keys], list(paths)]),
            capture_output=True,
            encoding="utf-8",
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        finished = (error.stdout or b"").count(b"\n")
        raise InputError(
            f"the pattern {keys[finished]!r:.80} takes too long to match",
            where=where,
            hint="Write the module names out instead.",
        ) from error
    lines = done.stdout.splitlines()
    return {
        key: {paths[i] for i in json.loads(line)} for key, line in zip(keys, lines, strict=True)
    }
