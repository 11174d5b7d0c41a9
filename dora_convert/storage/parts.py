"""What one thread writes of a file: its bytes go to their places, and are handed to the hash."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dora_convert.storage.behind import Behind
from dora_convert.storage.channel import Channel
from dora_convert.storage.chunks import CHUNK_BYTES, Chunk, Chunks
from dora_convert.storage.digest import FollowingDigest

__all__ = ["EarlyPart", "Part"]

# Less at a time, such as scales, is not worth a chunk.
_COLLECTED = 64 << 10
_PATIENCE = 1.0  # seconds after which a thread looks whether the hash still goes on


class Part:
    """`starts`: where each tensor begins. `spans`: what was written and not handed over yet.

    The same bytes may be written again, as they are when a unit of work has to be repeated.
    """

    def __init__(self, channel: Channel, starts: Mapping[str, int]) -> None:
        self.spans: list[tuple[int, int]] = []
        self._channel = channel
        self._starts = starts

    def write(self, name: str, offset: int, data: Tensor) -> None:
        """Bytes (a contiguous uint8 tensor) at `offset` of the tensor `name`."""
        self.overwrite(name, offset, data)
        start = self._starts[name] + offset
        self._add(start, start + data.numel())

    def overwrite(self, name: str, offset: int, data: Tensor) -> None:
        """The same over bytes that this part wrote, or copied, before."""
        self._channel.put(data.numpy().data, self._starts[name] + offset)

    def copy(self, name: str, offset: int, source: int, start: int, *, nbytes: int) -> None:
        """`nbytes` from `start` of the open file `source`, without passing through this process.

        Raises EOFError where the source ends too early, OSError where it cannot be read.
        """
        at = self._starts[name] + offset
        self._channel.copy(source, start, at, nbytes)
        self._add(at, at + nbytes)

    def finish(self) -> None:
        """Write what is still in memory."""

    def _add(self, start: int, stop: int) -> None:
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = self.spans[-1][0], stop
        else:
            self.spans.append((start, stop))


class EarlyPart(Part):
    """One whose bytes are final, so that they are hashed at once, from where they lie in memory.

    They are collected in chunks, and so may go past the page cache. Bytes that were handed over
    stay: what is written over them is dropped. (A unit that is repeated gives rows that are as
    good, but not always the same to the last bit.)
    """

    def __init__(
        self,
        channel: Channel,
        starts: Mapping[str, int],
        digest: FollowingDigest,
        chunks: Chunks,
        behind: Behind,
    ) -> None:
        super().__init__(channel, starts)
        self._digest = digest
        self._chunks = chunks
        self._behind = behind
        self._filling: dict[str, Chunk] = {}
        self._handed: dict[str, int] = {}  # up to where, in the file

    def write(self, name: str, offset: int, data: Tensor) -> None:
        """See `Part`."""
        at = self._starts[name] + offset
        handed = self._handed.setdefault(name, at)
        if at < handed:
            data, at = data[handed - at :], handed
        chunk = self._filling.get(name)
        if chunk is not None and chunk.start <= at < chunk.stop:
            chunk.stop = at
        if at != (handed if chunk is None else chunk.stop) or (
            chunk is None and data.numel() < _COLLECTED
        ):
            super().write(name, at - self._starts[name], data)
            return
        while data.numel():
            chunk = self._filling.get(name) or self._begin(name)
            if chunk is None:
                self._plainly(name, data)
                return
            data = data[chunk.append(data) :]
            if not chunk.room:
                self._hand_over(name)

    def copy(self, name: str, offset: int, source: int, start: int, *, nbytes: int) -> None:
        """See `Part`; through this process where that is faster than by the kernel."""
        at = self._starts[name] + offset
        stop = at + nbytes
        shift = start - at
        while at < stop:
            self._handed[name] = at
            count = min(stop - at, CHUNK_BYTES - at % CHUNK_BYTES)
            chunk = self._begin(name) if self._channel.copies_by_memory() else None
            if chunk is None:
                self._channel.copy(source, at + shift, at, count)
                self._digest.add([(at, at + count)])
            else:
                self._channel.fill(chunk, source, at + shift, count)
                self._hand_over(name)
            at += count

    def finish(self) -> None:
        """See `Part`."""
        for name in list(self._filling):
            self._hand_over(name)

    def _begin(self, name: str) -> Chunk | None:
        """A new chunk; None where there is none, and no sense in waiting for one."""
        start = self._handed[name]
        while True:
            waits = self._digest.is_front(start) and self._digest.is_following
            chunk = self._chunks.take(start, front=waits, timeout=_PATIENCE if waits else 0)
            if chunk is not None:
                self._filling[name] = chunk
            if chunk is not None or not waits or not self._chunks.most:
                return chunk

    def _hand_over(self, name: str) -> None:
        chunk = self._filling.pop(name)
        chunk.holders = 2
        self._handed[name] = chunk.stop
        self._behind.put(chunk)
        self._digest.give(chunk, self._chunks.give)

    def _plainly(self, name: str, data: Tensor) -> None:
        at = self._handed[name]
        self._channel.put(data.numpy().data, at)
        self._handed[name] = at + data.numel()
        self._digest.add([(at, at + data.numel())])
