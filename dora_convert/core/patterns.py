"""Matching module paths with patterns that come out of a file and may be hostile."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from dora_convert.errors import InputError

__all__ = ["first_matches"]

# Names as they are, in which a dot stands for any character: they are looked up.
_PLAIN = re.compile(r"(?P<start>\^?)(?P<name>(?:[\w.-]|\\\.)+)\$?")
_DOT = re.compile(r"(?<!\\)\.")
_MOST_KINDS = 256  # of plain keys; an adapter of many experts and a rank for each has thirty

# Others run in a child that can be stopped: CPython cannot interrupt its own matcher, nor the
# compiler of its expressions. The timer counts the child's own time, however busy the machine.
_SECONDS = 1.0
_MEMORY = 256 << 20
_CHILD = """
import json, re, resource, signal, sys
seconds, memory, patterns, paths = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
for p in patterns:
    try:
        compiled = re.compile(p)
    except (re.error, RecursionError, OverflowError) as error:
        print(json.dumps(str(error)), flush=True)
    else:
        print(json.dumps([i for i, s in enumerate(paths) if compiled.match(s)]), flush=True)
"""


def first_matches(keys: Iterable[str], paths: Sequence[str], *, where: str) -> dict[str, str]:
    """For each path the first key, in order, that matches it; paths without one are left out.

    A key matches as PEFT's `rank_pattern` does: as a regular expression that must reach the
    path's end and begin at its start or after a dot (peft/utils/other.py, `get_pattern_key`).

    Raises InputError for a key that is no regular expression, or that takes a second to match.
    """
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    found: dict[str, str] = {}
    for key, path in _matches(list(order), paths, where):
        if path not in found or order[key] < order[found[path]]:
            found[path] = key
    return {path: found[path] for path in paths if path in found}


_Kind: TypeAlias = tuple[bool, tuple[int, ...]]  # whether it is a whole path, and its pieces' sizes


def _matches(keys: list[str], paths: Sequence[str], where: str) -> Iterator[tuple[str, str]]:
    """Every key with every path that it matches."""
    kinds: dict[_Kind, dict[str, list[str]]] = {}
    others = []
    for key in keys:
        plain = _PLAIN.fullmatch(key)
        if plain is None:
            others.append(key)
            continue
        pieces = [piece.replace("\\.", ".") for piece in _DOT.split(plain["name"])]
        kind = bool(plain["start"]), tuple(map(len, pieces))
        if kind in kinds or len(kinds) < _MOST_KINDS:
            kinds.setdefault(kind, {}).setdefault(".".join(pieces), []).append(key)
        else:
            others.append(key)
    for path in paths:
        for (is_whole, sizes), names in kinds.items():
            start = len(path) - sum(sizes) - len(sizes) + 1
            if start == 0 or (start > 0 and not is_whole and path[start - 1] == "."):
                for key in names.get(_dotted(path[start:], sizes), ()):
                    yield key, path
    if others:
        yield from _match_apart(others, paths, where)


def _dotted(text: str, sizes: tuple[int, ...]) -> str:
    """The text with dots where those of a key with pieces of these sizes are."""
    ends = itertools.accumulate(sizes, lambda end, size: end + 1 + size)
    return ".".join(text[end - size : end] for end, size in zip(ends, sizes, strict=True))


def _match_apart(keys: list[str], paths: Sequence[str], where: str) -> Iterator[tuple[str, str]]:
    anchored = [rf"(.*\.)?({key})$" for key in keys]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _CHILD],
        input=json.dumps([_SECONDS, _MEMORY, anchored, list(paths)]),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    whole = done.stdout.split("\n")[:-1]  # the last line may have been cut off
    answers = [json.loads(line) for line in whole]
    for key, answer in zip(keys, answers, strict=False):
        if isinstance(answer, str):
            raise InputError(
                f"the pattern {key!r:.80} is not a regular expression: {answer}", where=where
            )
        yield from ((key, paths[i]) for i in answer)
    # Out of time it ends by a signal; out of memory in one of several ways.
    if len(answers) < len(keys):
        raise InputError(
            f"the pattern {keys[len(answers)]!r:.80} takes too long to match",
            where=where,
            hint="Write the module names out instead.",
        )
