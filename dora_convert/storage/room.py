"""Memory for threads, looked for before they are started."""

from __future__ import annotations

import mmap

__all__ = ["require_room"]

# The usual stack of 8 MiB, and what a thread takes until it runs a program of ours.
_THREAD = 16 << 20


def require_room(threads: int) -> None:
    """Raise MemoryError where the system has no address space for so many more threads.

    Python waits for ever for a thread that was given its stack, and then died of a lack of memory
    before it could say that it is there (https://github.com/python/cpython/issues/140746).
    """
    if threads < 1:
        return
    try:
        mmap.mmap(-1, threads * _THREAD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise MemoryError("can't start new thread") from error
