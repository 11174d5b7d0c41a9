"""The same promises where files are written in chunks, past the page cache, by a thread behind.

Large files are; here small ones too, and the first files of `merges` were written plainly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.merges import Merges
from tests.reliability.nursery import MAIN
from tests.reliability.test_errors import at_every_call
from tests.reliability.test_power import lose_at_every_call

CHUNKED = f"""
from dora_convert.storage import channel, chunks, parts
channel._LARGE, parts._COLLECTED = 0, 1
chunks.CHUNK_BYTES = parts.CHUNK_BYTES = 4096
{MAIN}
"""


@pytest.fixture(autouse=True)
def in_chunks(merges: Merges) -> Iterator[None]:
    merges.code = CHUNKED
    yield
    merges.code = MAIN


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_same_bytes(merges: Merges, workers: int) -> None:
    merges.clear()
    assert merges.run("--workers", workers).code == 0
    merges.check_promise()


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EINTR"])
def test_errors(merges: Merges, error: str) -> None:
    at_every_call(merges, error, step=11, first=4)


def test_short_writes(merges: Merges) -> None:
    """What is left of one is not aligned to pages."""
    for point in range(1, 40, 3):
        merges.clear()
        fault = merges.fault(point, "short", calls=("pwrite",), about=".safetensors")
        assert merges.run(fault=fault).code == 0
        merges.check_promise()


def test_lost_writes(merges: Merges) -> None:
    hits = 0
    for point in range(1, 60, 4):
        merges.clear()
        fault = merges.fault(point, "lost", calls=("pwrite",), about=".safetensors")
        ended = merges.run("--verify", "all", fault=fault)
        if ended.code == 0:
            break
        assert ended.code == 7, ended
        assert not list(merges.place.iterdir())
        hits += 1
    assert hits > 5


@pytest.mark.parametrize("what", ["contents", "names"])
def test_loss_of_power(merges: Merges, tmp_path: Path, what: str) -> None:
    lose_at_every_call(merges, tmp_path, what, step=13)


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_signals(merges: Merges, signal: str) -> None:
    for point in range(5, 100, 12):
        merges.clear()
        ended = merges.run("--workers", 2, fault=merges.fault(point, signal))
        assert ended.code in (0, 130, 143), ended
        merges.resume()


def test_memory(merges: Merges) -> None:
    """Threads that there is no room for are not waited for."""
    codes = set()
    for megabytes in (18, 24, 40, 64, 90, 4096):
        merges.clear()
        ended = merges.run("--workers", 2, limits={"AS": megabytes << 20})
        codes.add(ended.code)
        assert ended.code in (0, 5), (megabytes, ended)
        merges.resume()
    assert 0 in codes
