"""Chunks on their way to the file, while those who filled them go on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from dora_convert.storage.channel import Channel
from dora_convert.storage.chunks import Chunk
from dora_convert.storage.room import require_room

__all__ = ["Behind"]


class Behind:
    """A thread that writes chunks, in the order in which they come; started with the first.

    So a worker that waits for nothing but its own arithmetic keeps a core busy, and the disk has
    something to do meanwhile. After an error nothing more is written.
    """

    def __init__(self, channel: Channel, back: Callable[[Chunk], None]) -> None:
        self._channel = channel
        self._back = back
        self._queue: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def put(self, chunk: Chunk) -> None:
        """Write it, and give it back. Raises OutputError for an earlier one that failed."""
        if self._error is not None:
            raise self._error
        with self._lock:
            if self._thread is None:
                require_room(1)
                self._thread = threading.Thread(target=self._write, name="write", daemon=True)
                self._thread.start()
        self._queue.put(chunk)

    def finish(self) -> None:
        """Wait until all are written. Raises OutputError; may be called again."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Write no more, but for what is being written; may be called again."""
        if self._thread is not None:
            self._error = self._error or InterruptedError()
            self._queue.put(None)
            self._thread.join()

    def _write(self) -> None:
        while (chunk := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._channel.put_chunk(chunk)
            except BaseException as error:
                self._error = error
            finally:
                self._back(chunk)
