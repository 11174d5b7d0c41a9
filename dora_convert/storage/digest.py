"""The hash by which a file's contents are known, here and on the Hub."""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from dora_convert.storage.room import require_room

__all__ = ["FollowingDigest", "file_sha256"]

# Small enough that what was read is still in a core's own cache when it is hashed.
_CHUNK = 256 << 10


def file_sha256(file: Path) -> str:
    """The hash of a file's contents, in hexadecimal digits. Raises OSError."""
    with file.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class FollowingDigest:
    """The sha256 of a file of `nbytes` that is being written in any order, by any thread.

    A thread of its own follows the part at the front of the file that has no holes, so that little
    is left when the last byte comes. It hashes what the system gives back of the open file `fd`,
    as to whoever reads it later, and not what a worker had in memory. That costs a tenth more, and
    is the same for bytes that the kernel copied, and for those that were written over before they
    were added. Not through a mapping, which ends the process where the disk fails.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self._nbytes = nbytes
        self._digest = hashlib.sha256()
        self._buffer = memoryview(bytearray(_CHUNK))
        self._front = 0  # all bytes before it are there
        self._beyond: list[tuple[int, int]] = []  # a heap of spans behind a hole
        self._changed = threading.Condition()
        self._abandoned = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name="hash", daemon=True)
        require_room(1)
        self._thread.start()

    def add(self, spans: Iterable[tuple[int, int]]) -> None:
        """Bytes `begin:end` are there, and stay as they are."""
        with self._changed:
            for span in spans:
                heapq.heappush(self._beyond, span)
            while self._beyond and self._beyond[0][0] <= self._front:
                self._front = max(self._front, heapq.heappop(self._beyond)[1])
            self._changed.notify()

    @property
    def is_complete(self) -> bool:
        """Whether every byte is there, though perhaps not hashed."""
        return self._front == self._nbytes

    def result(self) -> str:
        """Wait for the rest of a complete file; in hexadecimal digits. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def close(self) -> None:
        """Read no more of the file, complete or not; may be called again."""
        self._abandoned = True
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _follow(self) -> None:
        at = 0
        try:
            while at < self._nbytes and not self._abandoned:
                with self._changed:
                    while self._front <= at and not self._abandoned:
                        self._changed.wait()
                    front = self._front
                at = self._catch_up(at, front)
        except BaseException as error:
            self._error = error
        finally:
            self._buffer = memoryview(b"")  # the file may have to wait long for the disk

    def _catch_up(self, start: int, stop: int) -> int:
        """Hash these bytes, or fewer once it is abandoned; returns up to where."""
        while start < stop and not self._abandoned:
            part = self._buffer[: stop - start]
            count = os.preadv(self._fd, [part], start)
            if count == 0:
                raise OSError(errno.EIO, "the file became shorter while it was written")
            self._digest.update(part[:count])
            start += count
        return start
