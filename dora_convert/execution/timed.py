"""Buffers, queues and files that say what they do to a timeline, and else are what they wrap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from dora_convert.core.tensors import TensorSpec
from dora_convert.execution.lanes import Buffers, DeviceBuffers, Parcel, Transport
from dora_convert.execution.timeline import COPY_BACK, COPY_UP, Row, Timeline
from dora_convert.storage.channel import Channel
from dora_convert.storage.chunks import Chunk, Chunks
from dora_convert.storage.digest import FollowingDigest, Piece
from dora_convert.storage.shards import ShardWriter

__all__ = ["TimedBuffers", "TimedTransport", "timed_lanes", "timed_shards"]

_numbers = itertools.count(1)


def timed_lanes(make: Callable[[], Buffers], timeline: Timeline) -> Callable[[], Buffers]:
    """The same buffers, timed."""
    return lambda: TimedBuffers(make(), timeline)


def timed_shards(
    timeline: Timeline,
) -> Callable[[Path, Sequence[TensorSpec], Chunks], ShardWriter]:
    """The same files, timed."""
    return lambda file, specs, chunks: _TimedShard(file, specs, chunks, timeline)


class TimedBuffers(Buffers):
    """Of one worker: `read` from where a block lands to where it is handed on, then `compute`.

    On a device the worker does not compute but `launch`, and has to `wait` where the memory that
    it needs is still on its way.
    """

    def __init__(self, inner: Buffers, timeline: Timeline) -> None:
        super().__init__(inner.device)
        self.block_bytes, self.kept_bytes = inner.block_bytes, inner.kept_bytes
        self._inner = inner
        self._timeline = timeline
        self._stage = ""
        self._since = 0.0
        self._computing = self._sending = "compute"
        if isinstance(inner, DeviceBuffers):
            inner.transport = TimedTransport(inner.transport, timeline)
            self._computing, self._sending = "launch", "wait"

    @contextmanager
    def _until_done(self) -> Iterator[None]:
        try:
            with self._inner.active():
                yield
        finally:
            self._now("")

    def active(self) -> AbstractContextManager[object]:
        """See `Buffers`."""
        return self._until_done()

    def take(self, kind: str, nbytes: int) -> Tensor:
        """See `Memory`."""
        return self._inner.take(kind, nbytes)

    def matrix(
        self, kind: str, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See `Memory`."""
        return self._inner.matrix(kind, rows, columns, dtype)

    def clear(self) -> None:
        """See `Memory`."""
        self._inner.clear()

    def landing(self, kind: str, nbytes: int) -> Tensor:
        """See `Buffers`."""
        self._now("wait")
        memory = self._inner.landing(kind, nbytes)
        self._now("read")
        return memory

    def upload(self, kind: str, stored: Tensor) -> Tensor:
        """See `Buffers`."""
        self._now(self._computing)
        return self._inner.upload(kind, stored)

    def send(self, work: Tensor, dtype: torch.dtype, put: Callable[[Tensor], None]) -> Tensor:
        """See `Buffers`."""
        self._now(self._sending)
        narrow = self._inner.send(work, dtype, self._apart(put))
        self._now(self._computing)
        return narrow

    def deliver(self, parcels: Sequence[Parcel]) -> None:
        """See `Buffers`."""
        self._now(self._sending)
        self._inner.deliver([(data, self._apart(put)) for data, put in parcels])
        self._now(self._computing)

    def finish(self) -> None:
        """See `Buffers`."""
        self._now("wait")
        self._inner.finish()
        self._now("")

    def shrink(self) -> bool:
        """See `Buffers`."""
        able = self._inner.shrink()
        self.block_bytes, self.kept_bytes = self._inner.block_bytes, self._inner.kept_bytes
        return able

    def _apart(self, put: Callable[[Tensor], object]) -> Callable[[Tensor], None]:
        """What is put is timed by the file."""

        def timed(data: Tensor) -> None:
            stage = self._stage
            self._now("")
            put(data)
            self._now(stage)

        return timed

    def _now(self, stage: str) -> None:
        """What went on ends, and this begins."""
        now = perf_counter()
        if self._stage and now > self._since:
            self._timeline.add(self._stage, self._since, now)
        self._stage, self._since = stage, now


class TimedTransport:
    """A device's queue: its copies, and as `compute` what lies between one up and the next back.

    That may be arithmetic, or waiting for what the worker does next. Times are those at which the
    queue got there, where it can tell them; else those at which the copy was asked for.
    """

    def __init__(self, inner: Transport, timeline: Timeline) -> None:
        self.device = inner.device
        self.pinned = inner.pinned
        self._inner = inner
        self._timeline = timeline
        number = next(_numbers)
        self._row = Row(-number, f"{inner.device}, queue {number}", str(inner.device))
        self._stamp = _stamps(inner.device)
        self._arrived: Callable[[], float] | None = None

    def active(self) -> AbstractContextManager[object]:
        """See `Transport`."""
        return self._inner.active()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Transport`; what comes back is bytes in a row, what goes there has rows."""
        back = target.dim() == 1
        begin = self._stamp()
        if back and self._arrived is not None:
            self._timeline.add_late("compute", self._row, self._arrived, begin)
        self._inner.copy(target, source)
        end = self._stamp()
        self._timeline.add_late(COPY_BACK if back else COPY_UP, self._row, begin, end)
        self._arrived = None if back else end

    def mark(self) -> Callable[[], None]:
        """See `Transport`."""
        return self._inner.mark()

    def release(self) -> None:
        """See `Transport`."""
        self._inner.release()


def _stamps(device: torch.device) -> Callable[[], Callable[[], float]]:
    """What marks a place in the device's current queue, and later tells when that was reached."""
    if device.type != "cuda":

        def now() -> Callable[[], float]:
            reached = perf_counter()
            return lambda: reached

        return now

    def event() -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(device))
        return mark

    first = event()
    first.synchronize()
    origin = perf_counter()

    def stamp() -> Callable[[], float]:
        mark = event()

        def reached() -> float:
            mark.synchronize()
            return origin + float(first.elapsed_time(mark)) / 1e3

        return reached

    return stamp


class _TimedChannel(Channel):
    def __init__(self, file: Path, path: Path, nbytes: int, timeline: Timeline) -> None:
        self._timeline = timeline
        super().__init__(file, path, nbytes)

    def put(self, data: memoryview, at: int) -> None:
        with self._timeline.during("write"):
            super().put(data, at)

    def put_chunk(self, chunk: Chunk) -> None:
        with self._timeline.during("write"):
            super().put_chunk(chunk)

    def fill(self, chunk: Chunk, source: int, start: int, nbytes: int) -> None:
        with self._timeline.during("copy"):
            super().fill(chunk, source, start, nbytes)

    def copy(self, source: int, start: int, at: int, nbytes: int) -> None:
        with self._timeline.during("copy"):
            super().copy(source, start, at, nbytes)

    def to_disk(self) -> None:
        with self._timeline.during("sync"):
            super().to_disk()


class _TimedDigest(FollowingDigest):
    def __init__(self, fd: int, nbytes: int, timeline: Timeline) -> None:
        self._timeline = timeline
        super().__init__(fd, nbytes)

    def _catch_up(self, start: int, piece: Piece) -> int:
        with self._timeline.during("hash"):
            return super()._catch_up(start, piece)


class _TimedShard(ShardWriter):
    def __init__(
        self, file: Path, specs: Sequence[TensorSpec], chunks: Chunks, timeline: Timeline
    ) -> None:
        self._timeline = timeline
        super().__init__(file, specs, chunks)

    def _opened(self) -> Channel:
        return _TimedChannel(self.file, self._unsealed, self.nbytes, self._timeline)

    def _following(self) -> FollowingDigest:
        return _TimedDigest(self._channel.fd, self.nbytes, self._timeline)
