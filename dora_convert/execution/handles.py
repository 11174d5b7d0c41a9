"""Files that safetensors' own reader keeps open while a result is looked at."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

__all__ = ["close_handles", "handle"]


def handle(file: Path) -> Any:
    """The reader of a file; opened once for many tensors, since it parses the header each time.

    A file that was written anew is opened anew. Raises SafetensorError, and OSError.
    """
    state = file.stat()
    return _opened(file, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=8)
def _opened(file: Path, inode: int, size: int, mtime: int) -> safe_open:
    return safe_open(file, framework="pt")


def close_handles() -> None:
    """Let go of all."""
    _opened.cache_clear()
