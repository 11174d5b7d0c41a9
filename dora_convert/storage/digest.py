"""The hash by which a file's contents are known, here and on the Hub."""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.storage.room import require_room

if TYPE_CHECKING:  # it brings torch, which who only hashes a file does without
    from dora_convert.storage.chunks import Chunk

__all__ = ["FollowingDigest", "Piece", "file_sha256"]

# Small enough that what was read is still in a core's own cache when it is hashed.
_CHUNK = 256 << 10


def file_sha256(file: Path) -> str:
    """The hash of a file's contents, in hexadecimal digits. Raises OSError."""
    with file.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class FollowingDigest:
    """The sha256 of a file of `nbytes` that is being written in any order, by any thread.

    A thread of its own follows the part at the front of the file that has no holes, so that little
    is left when the last byte comes. It hashes chunks from memory. Of all else it hashes what the
    system gives back of the open file `fd`: what the kernel copied, and what was written over
    before it was added. Not through a mapping, which ends the process where the disk fails.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self._nbytes = nbytes
        self._digest = hashlib.sha256()
        self._buffer = memoryview(bytearray(_CHUNK))
        self._front = 0  # all bytes before it are there
        self._beyond: list[Piece] = []  # a heap of what is behind a hole
        self._ready: deque[Piece] = deque()  # and what is not
        self._changed = threading.Condition()
        self._abandoned = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name="hash", daemon=True)
        require_room(1)
        self._thread.start()

    def add(self, spans: Iterable[tuple[int, int]]) -> None:
        """Bytes `begin:end` of the file are there, and stay as they are."""
        self._put(Piece(begin, end) for begin, end in spans)

    def give(self, chunk: Chunk, back: Callable[[Chunk], None]) -> None:
        """The same of bytes that are in memory too; `back` gets the chunk once they are hashed."""
        self._put([Piece(chunk.start, chunk.stop, chunk, back)])

    def is_front(self, start: int) -> bool:
        """Whether all bytes before `start` are there."""
        return start <= self._front

    @property
    def is_following(self) -> bool:
        """Whether chunks will still come back."""
        return self._error is None and not self._abandoned

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

    def _put(self, pieces: Iterable[Piece]) -> None:
        with self._changed:
            for piece in pieces:
                heapq.heappush(self._beyond, piece)
            while self._beyond and self._beyond[0].begin <= self._front:
                piece = heapq.heappop(self._beyond)
                self._front = max(self._front, piece.end)
                self._ready.append(piece)
            self._changed.notify()

    def _follow(self) -> None:
        at = 0
        try:
            while at < self._nbytes and not self._abandoned:
                with self._changed:
                    while not self._ready and not self._abandoned:
                        self._changed.wait()
                    piece = self._ready.popleft() if self._ready else Piece(at, at)
                at = self._catch_up(at, piece)
        except BaseException as error:
            self._error = error
        finally:
            self._buffer = memoryview(b"")  # the file may have to wait long for the disk
            self._ready.clear()

    def _catch_up(self, start: int, piece: Piece) -> int:
        """Hash what the piece adds, or less once it is abandoned; returns up to where."""
        if piece.chunk is not None:
            if start < piece.end:
                self._digest.update(piece.chunk.view(start, piece.end))
            assert piece.back is not None
            piece.back(piece.chunk)
            return max(start, piece.end)
        while start < piece.end and not self._abandoned:
            part = self._buffer[: piece.end - start]
            count = os.preadv(self._fd, [part], start)
            if count == 0:
                raise OSError(errno.EIO, "the file became shorter while it was written")
            self._digest.update(part[:count])
            start += count
        return start


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `begin:end` of the file, and where else they are."""

    begin: int
    end: int
    chunk: Chunk | None = None
    back: Callable[[Chunk], None] | None = None

    def __lt__(self, other: Piece) -> bool:
        return self.begin < other.begin
