"""Files of which only what is read is there: full in length, with holes that a source fills.

To whoever reads them they are files like all others, as long as they are read by this package's
own functions: every read asks here first, and a read of other files costs a look into an empty
table.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

from dora_convert.errors import HubError, OutputError
from dora_convert.storage.digest import file_sha256
from dora_convert.storage.oserrors import reading, writing
from dora_convert.storage.room import require_room

__all__ = [
    "Fetch",
    "SparseFile",
    "complete",
    "fill",
    "forget",
    "open_sparse",
    "released",
    "require",
]

Fetch = Callable[[int, int], Iterator[bytes]]  # the bytes start:stop, in order

_GAP = 1 << 20
_SHARE = 50  # a gap is fetched along if it is less than this part of what lies before it
_PIECE = 32 << 20
_AT_ONCE = 8

_Span = tuple[int, int]


class SparseFile:
    """One such file, and which of its bytes are there. Safe for threads.

    `sha256` is the hash of all of it, where that is known.
    """

    def __init__(self, file: Path, size: int, fetch: Fetch, sha256: str | None = None) -> None:
        self.size = size
        self.sha256 = sha256
        self._file = file
        self._fetch = fetch
        self._filled: list[_Span] = []  # apart from each other, in order
        self._lock = threading.Lock()
        self.forget()

    def require(self, start: int, stop: int) -> None:
        """See to it that the bytes `start:stop` are there."""
        for first, last in self.missing(start, stop):
            self._fill(first, last)

    def missing(self, start: int, stop: int) -> list[_Span]:
        """The parts of `start:stop` that are not there yet."""
        stop, found = min(stop, self.size), []
        with self._lock:
            at = bisect_right(self._filled, (start, start)) - 1
            for first, last in self._filled[max(at, 0) :]:
                if first >= stop:
                    break
                if first > start:
                    found.append((start, first))
                start = max(start, last)
        return [*found, (start, stop)] if start < stop else found

    def forget(self) -> None:
        """Give back the room that it takes; what is read afterwards comes anew."""
        with self._lock, writing(self._file), self._file.open("wb") as out:
            out.truncate(self.size)
            self._filled.clear()

    def _fill(self, start: int, stop: int) -> None:
        at = start
        with writing(self._file):
            fd = os.open(self._file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for chunk in self._fetch(start, stop):
                at += _pwrite(fd, self._file, chunk, at)
        finally:
            os.close(fd)
        assert at == stop, (self._file, start, stop, at)
        with self._lock:
            # Those that overlap or touch become one.
            low = bisect_left(self._filled, start, key=lambda span: span[1])
            high = bisect_right(self._filled, stop, key=lambda span: span[0])
            spans = [(start, stop), *self._filled[low:high]]
            self._filled[low:high] = [(min(s[0] for s in spans), max(s[1] for s in spans))]


_FILES: dict[Path, SparseFile] = {}
_SCOPE: ContextVar[ExitStack | None] = ContextVar("_SCOPE", default=None)


def open_sparse(file: Path, size: int, fetch: Fetch, *, sha256: str | None = None) -> None:
    """Make `file`, of `size` bytes, all of them a hole that `fetch` fills as it is read."""
    _FILES[file] = SparseFile(file, size, fetch, sha256)
    scope = _SCOPE.get()
    if scope is not None:
        scope.callback(_FILES.pop, file, None)


@contextmanager
def released() -> Iterator[ExitStack]:
    """What was opened inside is no longer known afterwards; the stack takes what else is to end.

    Used inside another, it is that other.
    """
    outer = _SCOPE.get()
    if outer is not None:
        yield outer
        return
    with ExitStack() as stack:
        token = _SCOPE.set(stack)
        try:
            yield stack
        finally:
            _SCOPE.reset(token)


def require(file: Path, start: int, stop: int) -> None:
    """To be called before the bytes `start:stop` of any input are read."""
    if _FILES and (sparse := _FILES.get(file)) is not None:
        sparse.require(start, stop)


def fill(wanted: Iterable[tuple[Path, int, int]]) -> None:
    """Bring many ranges at once, neighbours together and several at a time.

    Ranges of other files are passed over. Raises MemoryError where there is none for the threads.
    """
    spans: dict[Path, list[_Span]] = defaultdict(list)
    for file, start, stop in wanted:
        if file in _FILES:
            spans[file] += _FILES[file].missing(start, stop)
    pieces = [
        (file, start, min(start + _PIECE, last))
        for file, found in spans.items()
        for first, last in _joined(found)
        for start in range(first, last, _PIECE)
    ]
    require_room(min(_AT_ONCE, len(pieces)))
    with ThreadPoolExecutor(_AT_ONCE, "fetch") as pool:
        futures = [pool.submit(require, *piece) for piece in pieces]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def complete(files: Collection[Path]) -> None:
    """Bring all of these, and hold them against their hashes; others are there already.

    Raises HubError for what was changed on its way.
    """
    known = {file: _FILES[file] for file in files if file in _FILES}
    fill((file, 0, sparse.size) for file, sparse in known.items())
    for file, sparse in known.items():
        with reading(file):
            digest = file_sha256(file)
        if sparse.sha256 not in (None, digest):
            what = f"{file.name} was changed on its way here: its sha256 is another"
            raise HubError(what, hint="Run the command again.")


def forget(files: Iterable[Path]) -> None:
    """Give back the room that these take; others stay."""
    for file in files:
        if file in _FILES:
            _FILES[file].forget()


def _joined(spans: Iterable[_Span]) -> list[_Span]:
    """Neighbours as one, where the gap between them costs less than another request."""
    joined: list[_Span] = []
    for start, stop in sorted(spans):
        if joined:
            first, last = joined[-1]
            if start - last <= min(_GAP, (last - first) // _SHARE):
                joined[-1] = (first, max(last, stop))
                continue
        joined.append((start, stop))
    return joined


def _pwrite(fd: int, file: Path, data: bytes, offset: int) -> int:
    done = 0
    try:
        with writing(file):
            while done < len(data):
                done += os.pwrite(fd, data[done:], offset + done)
    except OutputError as error:
        hint = "Make room in the Hub's cache, or set HF_HOME to a larger disk."
        raise OutputError(error.what, where=error.where, hint=hint) from error
    return done
