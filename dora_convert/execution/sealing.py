"""The files of a run: opened when their first byte comes, on the disk soon after their last."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from dora_convert.core.plan import Plan, Shard
from dora_convert.core.tensors import TensorSpec
from dora_convert.execution.units import Unit
from dora_convert.storage.chunks import Chunks
from dora_convert.storage.oserrors import writing
from dora_convert.storage.publishing import sync
from dora_convert.storage.room import require_room
from dora_convert.storage.shards import ShardWriter

__all__ = ["OpenShards", "Sealer", "ShardMaker"]

ShardMaker: TypeAlias = Callable[[Path, Sequence[TensorSpec], Chunks], ShardWriter]


class OpenShards:
    """Files that are open, and how many units each still waits for; `make` opens one."""

    def __init__(
        self, plan: Plan, work: Iterable[Unit], folder: Path, make: ShardMaker = ShardWriter
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._make = make
        self._chunks = Chunks()
        self._waiting = Counter(unit.shard for unit in work)
        self._open: dict[int, ShardWriter] = {}
        self._lock = threading.Lock()

    def writer(self, index: int) -> ShardWriter:
        """The file of the shard of this index."""
        with self._lock:
            if index not in self._open:
                self._open[index] = self._made(self._plan.shards[index])
            return self._open[index]

    def done(self, index: int) -> ShardWriter | None:
        """One unit less; the file, once it was the last."""
        with self._lock:
            self._waiting[index] -= 1
            return self._open.pop(index) if self._waiting[index] == 0 else None

    def empty(self, skip: Container[int]) -> Iterator[tuple[int, ShardWriter]]:
        """Files without any byte of data, which no unit opens, but for those to `skip`."""
        for index, shard in enumerate(self._plan.shards):
            if index not in self._waiting and index not in skip:
                yield index, self._made(shard)

    def _made(self, shard: Shard) -> ShardWriter:
        file = self._folder / shard.file
        with writing(file):
            if not file.parent.is_dir():  # that of a pipeline's model
                file.parent.mkdir()
                sync(self._folder)
        return self._make(file, shard.specs, self._chunks)

    def close(self) -> None:
        """Close what is still open."""
        for writer in self._open.values():
            writer.close()


class Sealer:
    """Waits for the disk in a thread of its own, so that workers need not.

    `sealed` is told of every shard that is there: its index, its file, its sha256.
    """

    def __init__(self, sealed: Callable[[int, ShardWriter, str], None]) -> None:
        self._sealed = sealed
        self._queue: queue.SimpleQueue[tuple[int, ShardWriter] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._seal, name="sealer", daemon=True)
        require_room(1)
        self._thread.start()

    def put(self, index: int, writer: ShardWriter) -> None:
        """A shard is complete. Raises what went wrong with an earlier one."""
        self._queue.put((index, writer))
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait for all; raises what went wrong."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """The run failed: wait for the file in hand only."""
        self._error = self._error or InterruptedError()
        self._queue.put(None)
        self._thread.join()

    def _seal(self) -> None:
        while (item := self._queue.get()) is not None:
            index, writer = item
            try:
                if self._error is None:
                    self._sealed(index, writer, writer.seal())
            except BaseException as error:
                self._error = error
            finally:
                writer.close()
