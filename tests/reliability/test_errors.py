"""Errors of disk and system at any call, short and lost writes, and too little of everything."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.reliability.merges import Merges

POINTS = 60


def at_every_call(merges: Merges, error: str, *, step: int = 1, first: int = 1) -> None:
    """Each time it is said, what is finished is kept, and the same command ends the work."""
    point = first
    kept = set()
    while True:
        merges.clear()
        ended = merges.run(fault=merges.fault(point, error))
        if point > POINTS and ended.code == 0:
            break
        finished = merges.finished()
        kept.add(len(finished))
        # What is deleted only because it is of no use any more may stay.
        assert ended.code in (0, 5), ended
        if ended.code == 5:
            (line, *_) = ended.err.splitlines()[-3:]
            assert "Error: " in ended.err, ended
            assert "Traceback" not in ended.err
            assert ("the same command continues" in ended.err) == bool(finished), (line, ended)
        merges.resume()
        point += step
    assert len(kept) > 2


@pytest.mark.parametrize(("error", "first"), [("ENOSPC", 1), ("EIO", 4)])
def test_at_many_calls(merges: Merges, error: str, first: int) -> None:
    at_every_call(merges, error, step=9, first=first)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_at_every_call(merges: Merges, error: str) -> None:
    at_every_call(merges, error)


def test_fsync_that_fails(merges: Merges) -> None:
    """What the system may have lost is not trusted, though it can still be read."""
    merges.clear()
    fault = merges.fault(3, "EIO", calls=("fsync",), about=".safetensors")
    ended = merges.run(fault=fault)
    assert ended.code == 5
    assert "cannot be written: the disk reported an error" in ended.err
    assert "2 of 5 shards are kept in out.partial: the same command continues." in ended.err
    files = {entry.name for entry in (merges.partial / "files").iterdir()}
    assert files == set(merges.finished())
    assert len(files) == 2
    assert merges.resume() == 2


@pytest.mark.parametrize("about", [".safetensors", ".dora-convert"])
def test_short_writes(merges: Merges, about: str) -> None:
    for point in range(1, 4):
        merges.clear()
        fault = merges.fault(point, "short", calls=("write", "pwrite"), about=about)
        assert merges.run(fault=fault).code == 0
        merges.check_promise()


def test_lost_writes(merges: Merges) -> None:
    """The system says that it wrote, and did not: found by reading back all there is."""
    hits = 0
    for point in range(1, 40):
        merges.clear()
        fault = merges.fault(point, "lost", calls=("pwrite",))
        ended = merges.run("--verify", "all", fault=fault)
        if ended.code == 0:
            break
        assert ended.code == 7, ended
        assert "it was discarded" in ended.err
        assert not list(merges.place.iterdir())
        hits += 1
    assert hits > 5


def test_file_size_limit(merges: Merges) -> None:
    """As of a file system that has one, or `ulimit -f`; without being root."""
    merges.clear()
    ended = merges.run(limits={"FSIZE": 10_000})
    assert ended.code == 5
    assert "it would be larger than the file system or the limit of this process" in ended.err
    assert not list(merges.place.iterdir())
    assert merges.resume() == 0


@pytest.mark.parametrize("workers", [1, 4])
def test_memory(merges: Merges, workers: int) -> None:
    """It is said that there is too little, and none waits for a thread that never was."""
    codes = set()
    for megabytes in (1, 6, 9, 14, 18, 24, 64, 90, 4096):
        merges.clear()
        ended = merges.run("--workers", workers, limits={"AS": megabytes << 20})
        codes.add(ended.code)
        if ended.code:
            assert ended.code == 5, (megabytes, ended)
            assert "the memory does not suffice" in ended.err
        merges.resume()
    assert codes == {0, 5}


@pytest.mark.slow
def test_memory_in_many_sizes(merges: Merges) -> None:
    """As it is, unless the C library ends the process itself, which is as a SIGKILL is."""
    chance, codes = random.Random(7), Counter[int]()
    for _ in range(300):
        merges.clear()
        limit = int(2 ** chance.uniform(16, 28))
        ended = merges.run("--workers", chance.choice((1, 2, 4, 8)), limits={"AS": limit})
        codes[ended.code] += 1
        if ended.code == 5:
            assert "the memory does not suffice" in ended.err
        elif ended.code:
            assert ended.code in (127, -6), (limit, ended)
            assert "thread-local data" in ended.err or "glibc error" in ended.err, (limit, ended)
        merges.check_promise()
    assert codes[5] > 100
    assert codes[0] > 5
