"""Which commit of which repository a path in the Hub's cache belongs to: told by the path alone."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["identity", "origin"]

_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/([0-9a-f]{40})(?:/|$)")


def origin(path: Path) -> tuple[str, str] | None:
    """Repository and commit of a file or folder in the Hub's cache; None for any other."""
    found = _SNAPSHOT.search(path.as_posix())
    return (found[1].replace("--", "/", 1), found[2]) if found else None


def identity(path: Path) -> str | None:
    """`org/name@commit` of a file or folder in the Hub's cache, None for any other.

    A commit never changes, so what is the same in this is the same in every byte.
    """
    found = origin(path)
    return "@".join(found) if found else None
