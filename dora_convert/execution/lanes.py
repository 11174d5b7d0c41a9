"""A worker's memory, and its way to the device that does the arithmetic and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

__all__ = ["BLOCK_BYTES", "Buffers", "DeviceBuffers", "Memory", "Parcel", "PerThread", "Transport"]

# A block and its float32 copy stay in a core's cache: measured best from 0.5 to 2 MB.
BLOCK_BYTES = 1 << 20
# A weight of up to this size is kept by a worker that needs it again and again.
_KEPT_BYTES = 32 << 20
T = TypeVar("T")

# Bytes, and what takes them once they are on the host.
Parcel: TypeAlias = tuple[Tensor, Callable[[Tensor], object]]

_SLOTS = 2  # one block on its way while the next is read


class Memory:
    """Memory by purpose, reused for every block; grows to the longest row, never with the model.

    The views of it are kept too: making them anew for every block costs as much as a pass over it.
    """

    def __init__(self, device: torch.device | None = None, *, pinned: bool = False) -> None:
        self.device = device or torch.device("cpu")
        self._pinned = pinned
        self._bytes: dict[str, Tensor] = {}
        self._views: dict[str, tuple[tuple[int, int, torch.dtype], Tensor, Tensor]] = {}

    def take(self, kind: str, nbytes: int) -> Tensor:
        """At least `nbytes` bytes that belong to `kind` until it is taken again."""
        held = self._bytes.get(kind)
        if held is None or held.numel() < nbytes:
            self._views.pop(kind, None)
            held = self._bytes[kind] = torch.empty(
                max(nbytes, BLOCK_BYTES),
                dtype=torch.uint8,
                device=self.device,
                pin_memory=self._pinned,
            )
        return held

    def matrix(
        self, kind: str, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """A `[rows, columns]` matrix in the memory of `kind`, and the bytes under it."""
        key = (rows, columns, dtype)
        nbytes = rows * columns * dtype.itemsize
        memory = self.take(kind, nbytes)
        held = self._views.get(kind)
        if held is None or held[0] != key:
            flat = memory[:nbytes]
            held = self._views[kind] = (key, flat.view(dtype).view(rows, columns), flat)
        return held[1], held[2]

    def clear(self) -> None:
        """Let all of it go."""
        self._bytes.clear()
        self._views.clear()


class Buffers(Memory):
    """Of a worker that computes where it reads: on the CPU, in the memory that was read into."""

    block_bytes = BLOCK_BYTES
    kept_bytes = _KEPT_BYTES

    def active(self) -> AbstractContextManager[object]:
        """Within it all arithmetic of this thread belongs to this worker."""
        return nullcontext()

    def landing(self, kind: str, nbytes: int) -> Tensor:
        """Bytes on the host for the next block to be read into."""
        return self.take(kind, nbytes)

    def upload(self, kind: str, stored: Tensor) -> Tensor:
        """A block `[rows, columns]` that was read, on the device."""
        return stored

    def widen(self, kind: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The same in the working type, in memory of its own."""
        return self.working(self.upload(kind, stored), dtype)

    def working(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a block in the working type, in memory of its own."""
        work, _ = self.matrix("work", block.shape[0], block.shape[1], dtype)
        work.copy_(block)
        return work

    def send(self, work: Tensor, dtype: torch.dtype, put: Callable[[Tensor], None]) -> Tensor:
        """Narrow a block and hand its bytes to `put`, now or by `finish` at the latest.

        Returns the narrow block, which is valid until the next is sent.
        """
        narrow, data = self.matrix("out", work.shape[0], work.shape[1], dtype)
        narrow.copy_(work)
        self.deliver([(data, put)])
        return narrow

    def deliver(self, parcels: Sequence[Parcel]) -> None:
        """Hand bytes to what takes them, as `send` does: those of a block, which go together."""
        for data, put in parcels:
            put(data)

    def finish(self) -> None:
        """Wait until everything that was sent has been put."""

    def shrink(self) -> bool:
        """Smaller blocks from now on, because memory ran out; whether that is possible."""
        return False


class PerThread(threading.local):
    """One set of buffers for each thread that asks."""

    def __init__(self, make: Callable[[], Buffers]) -> None:
        self.own = make()

    def use(self, do: Callable[[Buffers], T]) -> T:
        """What `do` makes of this thread's buffers; once more with smaller blocks if it must be.

        So `do` has to give the same when it is called again. Raises torch.OutOfMemoryError where
        the device has too little memory for the smallest blocks.
        """
        with self.own.active():
            while True:
                try:
                    return do(self.own)
                except torch.OutOfMemoryError:
                    if not self.own.shrink():
                        raise


class Transport(Protocol):
    """What a device's library has for copies that go on while the host does something else."""

    device: torch.device
    pinned: bool

    def active(self) -> AbstractContextManager[object]:
        """Within it the thread's work goes to this worker's own queue."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy, in either direction."""

    def mark(self) -> Callable[[], None]:
        """A function that waits for all that is enqueued until now."""

    def release(self) -> None:
        """Give memory that is held in reserve back to the device."""


class DeviceBuffers(Buffers):
    """Of a worker that computes on a device: blocks go there and back in a queue of its own.

    What is read, computed and written overlaps twice: a worker reads the next block while the
    last is on its way, and other workers have queues of their own. Nothing waits for the device
    but the reuse of a host buffer whose copy has not ended.
    """

    def __init__(
        self, transport: Transport, block_bytes: int, kept_bytes: int = _KEPT_BYTES
    ) -> None:
        super().__init__(transport.device)
        self.block_bytes = block_bytes
        self.kept_bytes = kept_bytes
        self.transport = transport
        self._host = Memory(pinned=transport.pinned)
        self._turn: dict[str, int] = {}
        self._landed: dict[str, Callable[[], None]] = {}
        self._sent: dict[str, tuple[Callable[[], None], list[Parcel]]] = {}

    def active(self) -> AbstractContextManager[object]:
        """See `Buffers`."""
        return self.transport.active()

    def landing(self, kind: str, nbytes: int) -> Tensor:
        """See `Buffers`; of the two for each kind, the one whose copy began longer ago.

        Kinds that differ after a dot only, share what they land in.
        """
        kind = kind.partition(".")[0]
        self._turn[kind] = (self._turn.get(kind, 0) + 1) % _SLOTS
        slot = f"{kind}{self._turn[kind]}"
        if slot in self._landed:
            self._landed.pop(slot)()
        return self._host.take(slot, nbytes)

    def upload(self, kind: str, stored: Tensor) -> Tensor:
        """See `Buffers`."""
        block, _ = self.matrix(kind, stored.shape[0], stored.shape[1], stored.dtype)
        self.transport.copy(block, stored)
        way = kind.partition(".")[0]
        self._landed[f"{way}{self._turn.get(way, 0)}"] = self.transport.mark()
        return block

    def deliver(self, parcels: Sequence[Parcel]) -> None:
        """See `Buffers`."""
        slot = next((s for s in map(str, range(_SLOTS)) if s not in self._sent), None)
        slot = slot or self._put_oldest()
        host = self._host.take(f"out{slot}", sum(data.numel() for data, _ in parcels))
        arriving: list[Parcel] = []
        end = 0
        for data, put in parcels:
            start, end = end, end + data.numel()
            self.transport.copy(host[start:end], data)
            arriving.append((host[start:end], put))
        self._sent[slot] = (self.transport.mark(), arriving)

    def finish(self) -> None:
        """See `Buffers`."""
        while self._sent:
            self._put_oldest()

    def shrink(self) -> bool:
        """See `Buffers`; what was on its way is dropped, and has to be made again."""
        self._sent.clear()
        self._landed.clear()
        self.clear()
        self._host.clear()
        self.transport.release()
        self.block_bytes //= 2
        self.kept_bytes //= 2
        return self.block_bytes >= BLOCK_BYTES

    def _put_oldest(self) -> str:
        slot = next(iter(self._sent))
        wait, parcels = self._sent.pop(slot)
        wait()
        for data, put in parcels:
            put(data)
        return slot
