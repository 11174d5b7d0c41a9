"""Memory that bytes wait in, from the worker that made them until they are hashed."""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

__all__ = ["CHUNK_BYTES", "PAGE", "Chunk", "Chunks"]

# What a write past the page cache is aligned to: no file system asks for more than a page.
PAGE = 4096
CHUNK_BYTES = 1 << 20
# A worker or two that are ahead of the others by a whole unit; and what hash and disk lag behind.
_MOST = 32
_RESERVED = 8


class Chunk:
    """Bytes `start:stop` of a file. They lie in memory as far behind a page as they do there."""

    __slots__ = ("_bytes", "_limit", "_tensor", "holders", "start", "stop")

    def __init__(self) -> None:
        memory = mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(memory)
        self._tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.begin(0)

    def begin(self, at: int) -> None:
        """Empty it; the next byte is the file's byte `at`. It is full where the next one begins."""
        self.start = self.stop = at
        self.holders = 1
        self._limit = at - at % CHUNK_BYTES + CHUNK_BYTES

    @property
    def room(self) -> int:
        """How many bytes it still takes."""
        return self._limit - self.stop

    def append(self, data: Tensor) -> int:
        """Take as many bytes (uint8, on the CPU) as there is room for; returns how many."""
        count = min(self.room, data.numel())
        at = self.stop % CHUNK_BYTES
        self._tensor[at : at + count].copy_(data[:count])
        self.stop += count
        return count

    def free(self, nbytes: int) -> memoryview:
        """The memory of the next bytes, at most `nbytes`; `stop` is the caller's to move."""
        at = self.stop % CHUNK_BYTES
        return self._bytes[at : at + min(self.room, nbytes)]

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes `start:stop` of the file, which are in it."""
        at = start % CHUNK_BYTES
        return self._bytes[at : at + stop - start]


class Chunks:
    """The chunks of some files: few, made when they are needed, used again and again.

    A file is hashed from its front on, so that what lies behind a hole keeps its chunks. A part of
    them is reserved for the fronts themselves, which therefore never wait for ever.
    """

    def __init__(self) -> None:
        self.most = _MOST
        self._idle: list[Chunk] = []
        self._out = 0
        self._changed = threading.Condition()

    def take(self, start: int, *, front: bool, timeout: float = 0) -> Chunk | None:
        """One that begins at the file's byte `start`; None where none came back in so many seconds.

        `front`: all before it was handed over, so that the reserve is for it. `most` is how many
        there can be: fewer, once the system has no memory for more.
        """
        spare = 0 if front else _RESERVED
        with self._changed:
            self._changed.wait_for(lambda: not self.most or self.most - self._out > spare, timeout)
            if self.most - self._out <= spare:
                return None
            try:
                chunk = self._idle.pop() if self._idle else Chunk()
            except OSError:
                self.most = self._out
                return None
            self._out += 1
        chunk.begin(start)
        return chunk

    def give(self, chunk: Chunk) -> None:
        """One holder less: after the last it may be used again."""
        with self._changed:
            chunk.holders -= 1
            if chunk.holders:
                return
            self._out -= 1
            self._idle.append(chunk)
            self._changed.notify_all()
