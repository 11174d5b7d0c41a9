"""Writing one safetensors file: header first, then any region in any order, by any thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from dora_convert.core.tensors import TensorSpec
from dora_convert.storage.digest import FollowingDigest
from dora_convert.storage.header import layout
from dora_convert.storage.oserrors import writing
from dora_convert.storage.publishing import sync

__all__ = ["Part", "ShardWriter"]

# Where the kernel cannot copy between the two files itself, bytes go through memory.
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_CHUNK = 1 << 20


class ShardWriter:
    """A file whose every byte is accounted for before it is sealed, and has its name.

    Until then it is called `FILE.tmp`. `nbytes` is its size.
    """

    def __init__(self, file: Path, specs: Sequence[TensorSpec]) -> None:
        self.file = file
        plan = layout(specs)
        self.nbytes = plan.size
        self._unsealed = file.with_name(f"{file.name}.tmp")
        self._starts = plan.starts
        self._lock = threading.Lock()
        self._digest: FollowingDigest | None = None
        with writing(file):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._unsealed, flags, 0o666)
        try:
            with writing(file):
                os.ftruncate(self._fd, plan.size)
                _pwrite(self._fd, memoryview(plan.head), 0)
            self._digest = self._following()
            self._digest.add([(0, len(plan.head))])
        except BaseException:
            self.close()
            raise

    @contextmanager
    def part(self) -> Iterator[Part]:
        """What writes some of the file; its bytes count, and do not change, once the block ends."""
        part = self._part()
        yield part
        assert self._digest is not None
        self._digest.add(part.spans)

    def seal(self) -> str:
        """Bring the file to the disk, under its name, and close it; returns its sha256."""
        assert self._digest is not None
        assert self._digest.is_complete, self.file
        with writing(self.file):
            self._to_disk()
            found = self._digest.result()
            self._unsealed.rename(self.file)
            sync(self.file.parent)
        self.close()
        return found

    def close(self) -> None:
        """Close the file, complete or not; may be called again."""
        with self._lock:
            if self._digest is not None:
                self._digest.close()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    # What takes time, for who measures it.

    def _part(self) -> Part:
        return Part(self.file, self._fd, self._starts)

    def _following(self) -> FollowingDigest:
        return FollowingDigest(self._fd, self.nbytes)

    def _to_disk(self) -> None:
        os.fsync(self._fd)


class Part:
    """What one thread writes of a shard's tensors. `spans`: where in the file it is.

    The same bytes may be written again, as they are when a unit of work has to be repeated.
    """

    def __init__(self, file: Path, fd: int, starts: Mapping[str, int]) -> None:
        self.spans: list[tuple[int, int]] = []
        self.file = file
        self.fd = fd
        self.starts = starts

    def write(self, name: str, offset: int, data: Tensor) -> None:
        """Bytes (a contiguous uint8 tensor) at `offset` of the tensor `name`."""
        self.overwrite(name, offset, data)
        start = self.starts[name] + offset
        self._add(start, start + data.numel())

    def overwrite(self, name: str, offset: int, data: Tensor) -> None:
        """The same over bytes that this part wrote, or copied, before."""
        with writing(self.file):
            _pwrite(self.fd, data.numpy().data, self.starts[name] + offset)

    def copy(self, name: str, offset: int, source: int, start: int, *, nbytes: int) -> None:
        """`nbytes` from `start` of the open file `source`, without passing through this process.

        Raises EOFError where the source ends too early.
        """
        first = target = self.starts[name] + offset
        left = nbytes
        while left:
            with writing(self.file):
                count = _copy_range(source, self.fd, start, target, left)
            if count == 0:
                raise EOFError
            start, target, left = start + count, target + count, left - count
        self._add(first, target)

    def _add(self, start: int, stop: int) -> None:
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = self.spans[-1][0], stop
        else:
            self.spans.append((start, stop))


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _copy_range(source: int, target: int, start: int, offset: int, nbytes: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, nbytes, start, offset)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    return os.pwrite(target, os.pread(source, min(nbytes, _CHUNK), start), offset)
