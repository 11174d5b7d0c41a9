"""Writing one safetensors file: header first, then any region in any order, by any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dora_convert.core.tensors import TensorSpec
from dora_convert.storage.behind import Behind
from dora_convert.storage.channel import Channel
from dora_convert.storage.chunks import Chunks
from dora_convert.storage.digest import FollowingDigest
from dora_convert.storage.header import layout
from dora_convert.storage.oserrors import writing
from dora_convert.storage.parts import EarlyPart, Part
from dora_convert.storage.publishing import sync

__all__ = ["ShardWriter"]


class ShardWriter:
    """A file whose every byte is accounted for before it is sealed, and has its name.

    Until then it is called `FILE.tmp`. `nbytes` is its size. Several files may share `chunks`.
    """

    def __init__(
        self, file: Path, specs: Sequence[TensorSpec], chunks: Chunks | None = None
    ) -> None:
        self.file = file
        plan = layout(specs)
        self.nbytes = plan.size
        self._unsealed = file.with_name(f"{file.name}.tmp")
        self._starts = plan.starts
        self._lock = threading.Lock()
        self._chunks = chunks or Chunks()
        self._digest: FollowingDigest | None = None
        self._channel = self._opened()
        self._behind = Behind(self._channel, self._chunks.give)
        try:
            self._channel.put(memoryview(plan.head), 0)
            self._digest = self._following()
            self._digest.add([(0, len(plan.head))])
        except BaseException:
            self.close()
            raise

    @contextmanager
    def part(self, *, final: bool = False) -> Iterator[Part]:
        """What writes some of the file; its bytes count, and do not change, once the block ends.

        `final`: they do not change once they are written, or are as good as what would take their
        place.
        """
        assert self._digest is not None
        part = Part(self._channel, self._starts)
        if final and self._channel.takes_chunks:
            part = EarlyPart(self._channel, self._starts, self._digest, self._chunks, self._behind)
        yield part
        part.finish()
        self._digest.add(part.spans)

    def flush(self) -> None:
        """Wait until all that was written is with the system. Raises OutputError."""
        self._behind.finish()

    def seal(self) -> str:
        """Bring the file to the disk, under its name, and close it; returns its sha256."""
        assert self._digest is not None
        assert self._digest.is_complete, self.file
        self.flush()
        with writing(self.file):
            self._channel.to_disk()
            found = self._digest.result()
            self._unsealed.rename(self.file)
            sync(self.file.parent)
        self.close()
        return found

    def close(self) -> None:
        """Close the file, complete or not; may be called again."""
        with self._lock:
            self._behind.abandon()
            if self._digest is not None:
                self._digest.close()
            self._channel.close()

    # What takes time, for who measures it.

    def _opened(self) -> Channel:
        return Channel(self.file, self._unsealed, self.nbytes)

    def _following(self) -> FollowingDigest:
        return FollowingDigest(self._channel.fd, self.nbytes)
