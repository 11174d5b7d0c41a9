"""Room for threads is looked for, and its lack told, before one is started."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_convert.storage.room import require_room

MIB = 1 << 20


def forked(do: Callable[[], None]) -> int:
    """The exit code of a child that does this with 100 MiB of address space left."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 100 * MIB, used + 100 * MIB))
            do()
            code = 0
        except MemoryError as error:
            code = 5 if str(error) == "can't start new thread" else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
@pytest.mark.parametrize(("threads", "code"), [(0, 0), (4, 0), (8, 5), (10_000, 5)])
def test_room(threads: int, code: int) -> None:
    assert forked(lambda: require_room(threads)) == code


def test_nothing_is_kept() -> None:
    """Not even for a moment more than it takes to ask."""

    def ask() -> None:
        for _ in range(1000):
            require_room(4)

    assert forked(ask) == 0
