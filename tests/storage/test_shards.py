"""A file is written in any order; its hash, taken behind the writers, is that of `sha256sum`."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import OutputError
from dora_convert.storage import digest
from dora_convert.storage.header import layout
from dora_convert.storage.shards import ShardWriter

SPECS = [TensorSpec("a", DType.U8, (300, 1000)), TensorSpec("b", DType.U8, (70_001,))]
HEAD = len(layout(SPECS).head)
A, B = (torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (300_000, 70_001))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_CHUNK", 7000)


def opened(folder: Path) -> closing[ShardWriter]:
    return closing(ShardWriter(folder / "m.safetensors", SPECS))


def put(writer: ShardWriter, name: str, data: Tensor, start: int = 0) -> None:
    with writer.part() as part:
        part.write(name, start, data)


def coreutils(file: Path) -> str:
    done = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def threads() -> int:
    return sum(thread.name == "hash" for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [1, 4])
def test_pieces_in_any_order(tmp_path: Path, workers: int) -> None:
    pieces = [("a", A[i : i + 900], i) for i in range(0, len(A), 900)]
    pieces += [("b", B[i : i + 1234], i) for i in range(0, len(B), 1234)]
    random.Random(0).shuffle(pieces)
    with opened(tmp_path) as writer:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda piece: put(writer, *piece), pieces))
        found = writer.seal()
    file = tmp_path / "m.safetensors"
    assert found == coreutils(file)
    with safe_open(file, "pt") as held:
        assert torch.equal(held.get_tensor("a").view(-1), A)
        assert torch.equal(held.get_tensor("b"), B)
    assert threads() == 0


def test_the_front_is_hashed_while_the_rest_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing behind a hole is looked at, nor what may still be written over."""
    ends: list[int] = []
    until = threading.Condition()
    preadv = os.preadv

    def watched(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        with until:
            ends.append(offset + count)
            until.notify_all()
        return count

    def read_to(end: int) -> bool:
        with until:
            return until.wait_for(lambda: ends[-1:] == [end], timeout=30)

    monkeypatch.setattr(os, "preadv", watched)
    with opened(tmp_path) as writer:
        assert read_to(HEAD)
        put(writer, "a", A[:100_000])
        assert read_to(HEAD + 100_000)
        put(writer, "b", B)
        put(writer, "a", A[200_000:], 200_000)
        with writer.part() as part:
            part.write("a", 100_000, torch.zeros(100_000, dtype=torch.uint8))
            part.overwrite("a", 100_000, A[100_000:200_000])
            assert max(ends) == HEAD + 100_000
        assert read_to(HEAD + 370_001)
        assert sorted(ends) == ends
        assert writer.seal() == coreutils(tmp_path / "m.safetensors")


def test_a_piece_written_twice_counts_once(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        with writer.part() as part:
            part.write("a", 0, A[:50_000])
            part.write("a", 50_000, B[:10_000])
            part.write("a", 0, A[:30_000])
            part.write("a", 30_000, A[30_000:])
        with pytest.raises(AssertionError):
            writer.seal()
        put(writer, "b", B)
        assert writer.seal() == coreutils(tmp_path / "m.safetensors")


def test_copies_of_the_kernel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(A.numpy().tobytes())
    with opened(tmp_path) as writer, source.open("rb") as stream:
        put(writer, "b", B)
        with writer.part() as part:
            part.copy("a", 1000, stream.fileno(), 1000, nbytes=299_000)
            part.copy("a", 0, stream.fileno(), 0, nbytes=1000)
            part.overwrite("a", 5000, B[:1000])
        assert writer.seal() == coreutils(tmp_path / "m.safetensors")


def test_a_piece_that_failed_does_not_count(tmp_path: Path) -> None:
    def fail() -> None:
        with writer.part() as part:
            part.write("a", 0, A)
            part.write("nothing", 0, A)

    with opened(tmp_path) as writer:
        put(writer, "b", B)
        with pytest.raises(KeyError):
            fail()
        with pytest.raises(AssertionError):
            writer.seal()
    assert threads() == 0
    assert not (tmp_path / "m.safetensors").exists()


def test_a_file_that_cannot_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", broken)
    with opened(tmp_path) as writer:
        put(writer, "a", A)
        put(writer, "b", B)
        with pytest.raises(OutputError, match="disk reported an error"):
            writer.seal()
    assert not (tmp_path / "m.safetensors").exists()


def test_a_file_that_is_cut_off_meanwhile(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        put(writer, "b", B)
        os.truncate(tmp_path / "m.safetensors.tmp", 100)
        with writer.part() as part:  # written already, so the file stays short
            part.spans.append((HEAD, HEAD + 300_000))
        with pytest.raises(OutputError, match="disk reported an error"):
            writer.seal()
