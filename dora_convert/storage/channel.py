"""The way of bytes into one open file: through the page cache, or past it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from statistics import fmean
from time import perf_counter, thread_time

from dora_convert.storage.chunks import PAGE, Chunk
from dora_convert.storage.oserrors import writing
from dora_convert.storage.roads import Roads

__all__ = ["Channel"]

# Where the kernel cannot copy between the two files itself, bytes go through memory.
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_COPIED = 1 << 20
# Smaller files are not worth finding out.
_LARGE = 32 << 20
_CACHED, _DIRECT = 0, 1
_BY_KERNEL, _BY_MEMORY = 0, 1


class Channel:
    """A new file of `nbytes`, named `file` in errors, open at `path`.

    What is written through the page cache costs a core the time to find pages and to fill them,
    and lies in memory for who reads it next. Past it (`O_DIRECT`) the disk takes it from where it
    is, and the core is free. So chunks go past it where the disk needs less time for them than a
    core would, which is measured all along for every large file.

    What is in the cache of bytes that went past it would be stale, so that the two must keep apart.
    No page is written both ways: the ends of a chunk that share a page with others go through the
    cache. And none is read ahead into it by who reads the file back.
    """

    def __init__(self, file: Path, path: Path, nbytes: int) -> None:
        self.file = file
        # Others may hold up the core, or the disk: of waiting, the shortest counts.
        self._roads = Roads(fmean, min)
        self._copies = Roads(fmean, fmean)
        self._direct = -1
        with writing(file):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.fd = os.open(path, flags, 0o666)
            try:
                os.ftruncate(self.fd, nbytes)
                if nbytes >= _LARGE and os.fstatvfs(self.fd).f_frsize <= PAGE:
                    self._direct = _open_direct(path)
                if self._direct >= 0:
                    os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
            except BaseException:
                self.close()
                raise

    @property
    def takes_chunks(self) -> bool:
        """Whether there are two roads, so that it pays to collect chunks."""
        return self._direct >= 0

    def put(self, data: memoryview, at: int) -> None:
        """Bytes to `at` of the file, through the page cache."""
        with writing(self.file):
            _pwrite(self.fd, data, at)

    def put_chunk(self, chunk: Chunk) -> None:
        """A chunk to its place."""
        first = chunk.start + -chunk.start % PAGE
        last = chunk.stop - chunk.stop % PAGE
        if last <= first:
            self.put(chunk.view(chunk.start, chunk.stop), chunk.start)
            return
        with writing(self.file):
            middle = chunk.view(first, last)
            if self._roads.next() == _CACHED or not self._past_the_cache(middle, first):
                begun = thread_time()
                _pwrite(self.fd, middle, first)
                self._roads.took(_CACHED, thread_time() - begun, len(middle))
            for start, stop in ((chunk.start, first), (last, chunk.stop)):
                _pwrite(self.fd, chunk.view(start, stop), start)

    def copies_by_memory(self) -> bool:
        """Whether the next bytes of another file are better read and put than copied."""
        return self._copies.next() == _BY_MEMORY

    def fill(self, chunk: Chunk, source: int, start: int, nbytes: int) -> None:
        """Read what is to be copied. Raises EOFError where the source ends too early, OSError."""
        begun, left = perf_counter(), nbytes
        while left:
            count = os.preadv(source, [chunk.free(left)], start)
            if count == 0:
                raise EOFError
            chunk.stop, start, left = chunk.stop + count, start + count, left - count
        seconds = perf_counter() - begun + self._roads.seconds(nbytes)
        self._copies.took(_BY_MEMORY, seconds, nbytes)

    def copy(self, source: int, start: int, at: int, nbytes: int) -> None:
        """`nbytes` from `start` of another open file, by the kernel where it can.

        It then shares them, where the file system can do that. Raises EOFError where the source
        ends too early.
        """
        begun, done = perf_counter(), 0
        while done < nbytes:
            count = self._copy(source, start + done, at + done, nbytes - done)
            if count == 0:
                raise EOFError
            done += count
        self._copies.took(_BY_KERNEL, perf_counter() - begun, nbytes)

    def to_disk(self) -> None:
        """Wait until all is on the disk. Raises OSError."""
        os.fsync(self.fd)

    def close(self) -> None:
        """May be called again."""
        for fd in (self._direct, self.fd):
            if fd >= 0:
                os.close(fd)
        self._direct = self.fd = -1

    def _copy(self, source: int, start: int, at: int, nbytes: int) -> int:
        with writing(self.file):
            if hasattr(os, "copy_file_range"):
                try:
                    return os.copy_file_range(source, self.fd, nbytes, start, at)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
            return os.pwrite(self.fd, os.pread(source, min(nbytes, _COPIED), start), at)

    def _past_the_cache(self, data: memoryview, at: int) -> bool:
        """Whether the file system took it."""
        begun = perf_counter()
        try:
            _pwrite(self._direct, data, at)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        self._roads.took(_DIRECT, perf_counter() - begun, len(data))
        return True


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except (AttributeError, OSError):  # macOS has no such flag, some file systems refuse it
        return -1


def _pwrite(fd: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
