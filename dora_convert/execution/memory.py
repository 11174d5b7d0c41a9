"""Giving memory back that the C library would keep."""

from __future__ import annotations

import ctypes

__all__ = ["trim"]


def trim() -> None:
    """Return freed memory to the system, where the C library can be told to (glibc).

    glibc keeps blocks of up to 32 MiB once a block of such a size was freed, and what is between
    them: without this a process that makes and frees large matrices grows with their number.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
