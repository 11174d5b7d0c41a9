"""Files that are sent while others are still being made."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

from dora_convert.hub.client import without_bars
from dora_convert.hub.push import Destination, begin, look_at
from dora_convert.hub.upload import Upload
from dora_convert.storage.room import require_room

__all__ = ["Ahead"]


class Ahead:
    """Sends files one by one, in a thread of its own; nobody sees them before a commit is made.

    What goes wrong here ends it and is not told, nor that there is no memory for a thread yet: the
    push at the end sends what is missing then, or says why that cannot be.
    """

    def __init__(self, repo: str, to: Destination) -> None:
        self._repo = repo
        self._to = to
        self._upload: Upload | None = None
        self._queue: queue.SimpleQueue[tuple[str, Path, str | None] | None] = queue.SimpleQueue()
        self._is_over = False
        self._thread: threading.Thread | None = None

    def offer(self, name: str, file: Path, origin: str | None = None) -> None:
        """A file is complete, and will be called `name`.

        `origin`, as `org/name@commit`, is where its contents may be from.
        """
        self._queue.put((name, file, origin))
        if self._thread is None:
            self._thread = self._started()

    def abandon(self) -> None:
        """Send no more."""
        self._is_over = True
        self._queue.put(None)

    def settled(self) -> Upload | None:
        """Send no more, and wait for the file in hand; what was sent, if anything was."""
        self.abandon()
        if self._thread is not None:
            self._thread.join()
        return self._upload

    def _started(self) -> threading.Thread | None:
        # The end of the program does not wait for it: what is lost is sent once more.
        thread = threading.Thread(target=self._send, name="ahead", daemon=True)
        try:
            require_room(1)
            thread.start()
        except (MemoryError, RuntimeError):
            return None
        return thread

    def _send(self) -> None:
        while (item := self._queue.get()) is not None and not self._is_over:
            name, file, origin = item
            try:
                if self._upload is None:
                    target = look_at(self._repo, self._to)
                    self._upload = begin(target, self._to, origin)
                with without_bars():
                    self._upload.add(name, file, at_once=True)
            except Exception:
                return
