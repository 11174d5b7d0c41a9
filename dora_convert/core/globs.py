"""Globs over names, as users write them: they match whole names, case and all."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

__all__ = ["matches_any"]


def matches_any(name: str, globs: Iterable[str]) -> bool:
    """Whether one of them matches all of the name."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
