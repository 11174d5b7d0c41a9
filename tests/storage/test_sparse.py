"""Files that fill as they are read, against the bytes that they stand for."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_convert.errors import HubError, OutputError
from dora_convert.storage import sparse
from dora_convert.storage.opening import opened, pread_exactly
from dora_convert.storage.sparse import complete, fill, forget, open_sparse, released, require
from tests.storage.test_room import forked

CONTENT = random.Random(0).randbytes(5000)


class Source:
    """Gives ranges of CONTENT in small chunks, and remembers which."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.asked: list[tuple[int, int]] = []
        self.lock = threading.Lock()

    def __call__(self, start: int, stop: int) -> Iterator[bytes]:
        with self.lock:
            self.asked.append((start, stop))
        for at in range(start, stop, 700):
            yield self.content[at : min(at + 700, stop)]

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.asked)


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    with released():
        yield
    assert not sparse._FILES


def made(tmp_path: Path, source: Source, *, sha256: str | None = None) -> Path:
    file = tmp_path / "x.safetensors"
    open_sparse(file, len(CONTENT), source, sha256=sha256)
    return file


def read(file: Path, start: int, stop: int) -> bytes:
    with opened(file) as (fd, _):
        return pread_exactly(fd, file, length=stop - start, offset=start)


def test_it_has_its_length_and_takes_no_room(tmp_path: Path) -> None:
    file = made(tmp_path, Source())
    assert file.stat().st_size == len(CONTENT)
    assert file.stat().st_blocks == 0


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 900)), min_size=1, max_size=30)
)
def test_whatever_is_read_is_right_and_comes_once(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]
) -> None:
    source = Source()
    file = made(tmp_path_factory.mktemp("x"), source)
    wanted: set[int] = set(range(64))  # by which a file is told from a web page
    for start, length in spans:
        stop = min(start + length, len(CONTENT))
        assert read(file, start, stop) == CONTENT[start:stop]
        wanted |= set(range(start, stop))
        assert source.nbytes == len(wanted)


def test_from_several_threads(tmp_path: Path) -> None:
    file = made(tmp_path, Source())
    spans = [(i * 37 % 4900, i * 37 % 4900 + 100) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda span: read(file, *span), spans))
    assert found == [CONTENT[start:stop] for start, stop in spans]


def test_many_at_once(tmp_path: Path) -> None:
    """Neighbours are one request; a gap that is small beside them is fetched along."""
    source = Source()
    file = made(tmp_path, source)
    other = tmp_path / "other"
    fill([(file, 3000, 3500), (file, 0, 1000), (file, 1000, 2000), (other, 0, 10)])
    assert sorted(source.asked) == [(0, 2000), (3000, 3500)]
    source.asked.clear()
    fill([(file, 0, 2000), (file, 3500, 4000), (file, 4010, 4500)])
    assert sorted(source.asked) == [(3500, 4500)]
    assert read(file, 0, 2000) + read(file, 3000, 4500) == CONTENT[:2000] + CONTENT[3000:4500]


def test_large_ranges_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_PIECE", 2000)
    source = Source()
    file = made(tmp_path, source)
    fill([(file, 0, len(CONTENT))])
    assert sorted(source.asked) == [(0, 2000), (2000, 4000), (4000, 5000)]
    assert file.read_bytes() == CONTENT


def test_all_of_it(tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    file = made(tmp_path, Source(), sha256=digest)
    complete([file, tmp_path / "other"])
    assert file.read_bytes() == CONTENT
    forget([file, tmp_path / "other"])
    assert file.stat().st_blocks == 0
    assert read(file, 100, 200) == CONTENT[100:200]


def test_what_was_changed_on_its_way(tmp_path: Path) -> None:
    other = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    file = made(tmp_path, Source(other), sha256=hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(HubError, match=r"x\.safetensors was changed on its way here"):
        complete([file])


def test_a_source_that_fails(tmp_path: Path) -> None:
    """What did not come is asked for again, and nothing that is a hole is taken for data."""

    class Failing(Source):
        def __call__(self, start: int, stop: int) -> Iterator[bytes]:
            yield self.content[start : start + 10]
            raise HubError("no")

    file = tmp_path / "x.safetensors"
    open_sparse(file, len(CONTENT), Failing())
    for _ in range(2):
        with pytest.raises(HubError):
            require(file, 0, 100)
        with pytest.raises(HubError):
            fill([(file, 0, 100), (file, 1000, 1100)])


def test_what_is_released_is_known_no_more(tmp_path: Path) -> None:
    source = Source()
    with released():  # inside another: it is that one's
        file = made(tmp_path, source)
    require(file, 0, 100)
    assert source.nbytes == 100


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(tmp_path, Source())

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(sparse.os, "pwrite", full)
    with pytest.raises(OutputError, match="no space") as caught:
        require(file, 0, 100)
    assert "HF_HOME" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
@pytest.mark.parametrize(("pieces", "code"), [(1, 0), (8, 5)])
def test_memory_for_threads_is_looked_for(tmp_path: Path, pieces: int, code: int) -> None:
    """In a child with memory for a few of them; it is told before one is started."""
    file = made(tmp_path, Source())
    assert forked(lambda: fill((file, i * 500, i * 500 + 9) for i in range(pieces))) == code
