"""Writing one safetensors file: header first, then any region in any order, by any thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from dora_convert.core.tensors import TensorSpec
from dora_convert.storage.digest import file_sha256
from dora_convert.storage.header import layout
from dora_convert.storage.oserrors import writing
from dora_convert.storage.publishing import sync
from dora_convert.storage.room import require_room

__all__ = ["ShardWriter"]

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
        self._left = plan.size - len(plan.head)
        self._lock = threading.Lock()
        with writing(file):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._unsealed, flags, 0o666)
        try:
            with writing(file):
                os.ftruncate(self._fd, plan.size)
            self._pwrite(memoryview(plan.head), 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, offset: int, data: Tensor) -> None:
        """Bytes (a contiguous uint8 tensor) at `offset` of the tensor `name`."""
        self._pwrite(data.numpy().data, self._starts[name] + offset)
        self._count(data.numel())

    def overwrite(self, name: str, offset: int, data: Tensor) -> None:
        """The same over bytes that were written, and counted, before."""
        self._pwrite(data.numpy().data, self._starts[name] + offset)

    def copy(self, name: str, offset: int, source: int, start: int, *, nbytes: int) -> None:
        """`nbytes` from `start` of the open file `source`, without passing through this process.

        Raises EOFError where the source ends too early.
        """
        target = self._starts[name] + offset
        left = nbytes
        while left:
            with writing(self.file):
                count = _copy_range(source, self._fd, start, target, left)
            if count == 0:
                raise EOFError
            start, target, left = start + count, target + count, left - count
        self._count(nbytes)

    @property
    def is_complete(self) -> bool:
        """Whether every byte of every tensor came."""
        return self._left == 0

    def seal(self) -> str:
        """Bring the file to the disk, under its name, and close it; returns its sha256."""
        assert self.is_complete, (self.file, self._left)
        require_room(1)
        # What is hashed is what the system gives back, meanwhile, while the disk takes its time.
        with writing(self.file), ThreadPoolExecutor(1) as other:
            digest = other.submit(file_sha256, self._unsealed)
            os.fsync(self._fd)
            found = digest.result()
            self._unsealed.rename(self.file)
            sync(self.file.parent)
        self.close()
        return found

    def close(self) -> None:
        """Close the file, complete or not; may be called again."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._left -= nbytes
        assert self._left >= 0, self.file

    def _pwrite(self, data: memoryview, offset: int) -> None:
        done = 0
        with writing(self.file):
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], offset + done)


def _copy_range(source: int, target: int, start: int, offset: int, nbytes: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, nbytes, start, offset)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    return os.pwrite(target, os.pread(source, min(nbytes, _CHUNK), start), offset)
