"""The system's page cache: what a merge leaves in it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path

__all__ = ["drop", "is_larger_than_memory", "want"]


def is_larger_than_memory(nbytes: int) -> bool:
    """Whether so much, read and written, would push everything else out of the page cache."""
    try:
        return 2 * nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return False


def drop(spans: Iterable[tuple[Path, int, int]]) -> None:
    """Let go of bytes `begin:end` of files that will not be wanted again soon; a hint, no more."""
    _advise(spans, "POSIX_FADV_DONTNEED")


def want(spans: Iterable[tuple[Path, int, int]]) -> None:
    """Have bytes `begin:end` of files brought that will be read soon, and none around them."""
    _advise(spans, "POSIX_FADV_WILLNEED")


def _advise(spans: Iterable[tuple[Path, int, int]], what: str) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for file, group in groupby(spans, itemgetter(0)):
        with suppress(OSError):
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for _, begin, end in group:
                    os.posix_fadvise(fd, begin, end - begin, getattr(os, what))
            finally:
                os.close(fd)
