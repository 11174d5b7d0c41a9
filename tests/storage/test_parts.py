"""Chunks of large files are hashed from memory, and written either way to the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import OutputError
from dora_convert.storage import channel, chunks
from dora_convert.storage.chunks import CHUNK_BYTES
from dora_convert.storage.digest import FollowingDigest
from dora_convert.storage.header import layout
from dora_convert.storage.roads import Roads
from dora_convert.storage.shards import ShardWriter

SIZES = {"a": 7 * CHUNK_BYTES + 12_345, "b": 3 * CHUNK_BYTES + 1, "c": 100}
SPECS = [TensorSpec(name, DType.U8, (size,)) for name, size in SIZES.items()]
HEAD = len(layout(SPECS).head)
CACHED, DIRECT = 0, 1
KERNEL, MEMORY = 0, 1
UNIT, BLOCK = 2_500_000, 300_001


def noise(size: int, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=made)


DATA = {name: noise(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
EXPECTED = layout(SPECS).head + b"".join(data.numpy().tobytes() for data in DATA.values())


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_LARGE", 0)


@pytest.fixture
def direct(tmp_path: Path) -> None:
    """Needs a file system that writes past the page cache."""
    try:
        os.close(os.open(tmp_path / "tried", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")


def opened(folder: Path) -> closing[ShardWriter]:
    return closing(ShardWriter(folder / "m.safetensors", SPECS))


def unit(writer: ShardWriter, name: str, start: int, stop: int) -> None:
    with writer.part(final=True) as part:
        for at in range(start, stop, BLOCK):
            part.write(name, at, DATA[name][at : min(at + BLOCK, stop)])


def units() -> list[tuple[str, int, int]]:
    return [(n, i, min(i + UNIT, s)) for n, s in SIZES.items() for i in range(0, s, UNIT)]


def sealed(writer: ShardWriter) -> None:
    """It is what it should be, and so is its hash."""
    found = writer.seal()
    assert writer.file.read_bytes() == EXPECTED
    assert found == hashlib.sha256(EXPECTED).hexdigest()


def written(folder: Path) -> None:
    """All of it in order, by one thread."""
    with opened(folder) as writer:
        for one in units():
            unit(writer, *one)
        sealed(writer)


def is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


def take(monkeypatch: pytest.MonkeyPatch, road: int | None) -> None:
    if road is not None:
        monkeypatch.setattr(Roads, "next", lambda _: road)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Whether each pwrite goes past the cache, where it begins and how much it is."""
    seen: list[tuple[int, int, int]] = []
    pwrite = os.pwrite

    def watch(fd: int, data: memoryview, at: int) -> int:
        seen.append((is_direct(fd), at, len(data)))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", watch)
    return seen


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("road", [CACHED, DIRECT, None])
def test_units_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, road: int | None
) -> None:
    take(monkeypatch, road)
    work = units()
    random.Random(workers).shuffle(work)
    with opened(tmp_path) as writer:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda one: unit(writer, *one), work))
        sealed(writer)


@pytest.mark.usefixtures("direct")
def test_all_but_the_ends_goes_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, DIRECT)
    seen = watched(monkeypatch)
    written(tmp_path)
    direct_pages = {
        page for past, at, n in seen if past for page in range(at // 4096, (at + n) // 4096)
    }
    cached_pages = {
        page
        for past, at, n in seen
        if not past and n
        for page in range(at // 4096, (at + n - 1) // 4096 + 1)
    }
    assert not direct_pages & cached_pages
    assert len(direct_pages) > 0.98 * len(EXPECTED) / 4096
    assert all(at % 4096 == n % 4096 == 0 for past, at, n in seen if past)


@pytest.mark.usefixtures("direct")
def test_nothing_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes into the cache before it is written past it, might be taken for it later."""
    told: list[tuple[str, int, int, int]] = []

    def advise(fd: int, start: int, length: int, advice: int) -> None:
        told.append((Path(f"/proc/self/fd/{fd}").readlink().name, start, length, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with opened(tmp_path):
        assert told == [("m.safetensors.tmp", 0, 0, os.POSIX_FADV_RANDOM)]


@pytest.mark.usefixtures("direct")
def test_blocks_larger_than_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at the ends of a chunk would be written both ways."""
    monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_frsize=16384))
    seen = watched(monkeypatch)
    written(tmp_path)
    assert not any(past for past, _, _ in seen)


@pytest.mark.usefixtures("direct")
def test_nothing_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    preadv = os.preadv

    def watch(fd: int, buffers: list[memoryview], at: int) -> int:
        nonlocal read
        count = preadv(fd, buffers, at)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", watch)
    written(tmp_path)
    assert read == HEAD + 100  # the header, and what was too little to collect


@pytest.mark.usefixtures("direct")
def test_a_file_system_that_refuses_what_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, DIRECT)
    refused = 0

    pwrite = os.pwrite

    def only_cached(fd: int, data: memoryview, at: int) -> int:
        nonlocal refused
        if is_direct(fd):
            refused += 1
            raise OSError(errno.EINVAL, "not aligned enough")
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", only_cached)
    written(tmp_path)
    assert refused


def test_a_file_system_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_, asked = os.open, []

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            asked.append(path)
            raise OSError(errno.EINVAL, "no such thing here")
        return open_(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    written(tmp_path)
    assert asked


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("road", [CACHED, DIRECT])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: int, number: int
) -> None:
    take(monkeypatch, road)
    pwrite = os.pwrite

    def fail(fd: int, data: memoryview, at: int) -> int:
        if at >= 2 * CHUNK_BYTES:
            raise OSError(number, "no")
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", fail)

    def write(writer: ShardWriter) -> None:
        unit(writer, "a", 0, SIZES["a"])
        writer.flush()

    with opened(tmp_path) as writer, pytest.raises(OutputError, match=r"m\.safetensors cannot be"):
        write(writer)
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("road", [CACHED, DIRECT, None])
def test_what_was_handed_over_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: int | None
) -> None:
    """A unit that is repeated may come out otherwise; file and hash must be of the same bytes."""
    take(monkeypatch, road)
    with opened(tmp_path) as writer:
        with writer.part(final=True) as part:
            other = DATA["a"].clone()
            kept = 2 * CHUNK_BYTES - HEAD  # two chunks were full by then, the third was not
            other[kept:] += 1
            part.write("a", 0, other[: kept + 500_000])
            other[:kept] += 1
            other[kept:] -= 1
            for at in range(0, SIZES["a"], BLOCK):
                part.write("a", at, other[at : at + BLOCK])
        unit(writer, "b", 0, SIZES["b"])
        unit(writer, "c", 0, SIZES["c"])
        sealed(writer)


def test_a_gap_is_left_to_others(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        with writer.part(final=True) as part:
            part.write("a", 0, DATA["a"][:200_000])
            part.write("a", 500_000, DATA["a"][500_000:])
            part.write("b", 0, DATA["b"])
        unit(writer, "a", 200_000, 500_000)
        unit(writer, "c", 0, SIZES["c"])
        sealed(writer)


def test_a_part_of_several_tensors(tmp_path: Path) -> None:
    """Codes and scales come by turns."""
    with opened(tmp_path) as writer:
        with writer.part(final=True) as part:
            for at in range(0, SIZES["a"], BLOCK):
                part.write("a", at, DATA["a"][at : at + BLOCK])
                half = DATA["b"][at // 2 : at // 2 + BLOCK // 2 + 1]
                part.write("b", at // 2, half)
            part.write("c", 0, DATA["c"])
            part.write("b", SIZES["a"] // 2, DATA["b"][SIZES["a"] // 2 :])
        sealed(writer)


@pytest.mark.usefixtures("direct")
def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a hole, and with a hash that lags, there are no more chunks than allowed."""
    monkeypatch.setattr(chunks, "_MOST", 4)
    monkeypatch.setattr(chunks, "_RESERVED", 2)
    made = 0
    build = chunks.Chunk.__init__

    def count(self: chunks.Chunk) -> None:
        nonlocal made
        made += 1
        build(self)

    monkeypatch.setattr(chunks.Chunk, "__init__", count)
    with opened(tmp_path) as writer:
        for one in reversed(units()):
            unit(writer, *one)
        sealed(writer)
    assert 2 <= made <= 4


@pytest.mark.usefixtures("direct")
def test_the_front_waits_for_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_MOST", 2)
    monkeypatch.setattr(chunks, "_RESERVED", 1)
    may_hash = threading.Event()
    catch_up = FollowingDigest._catch_up

    def late(self: FollowingDigest, *args: object) -> int:
        may_hash.wait(30)
        return catch_up(self, *args)

    monkeypatch.setattr(FollowingDigest, "_catch_up", late)
    with opened(tmp_path) as writer, ThreadPoolExecutor(1) as pool:
        done = pool.submit(unit, writer, "a", 0, SIZES["a"])
        with pytest.raises(TimeoutError):
            done.result(0.5)
        may_hash.set()
        done.result(30)
        unit(writer, "b", 0, SIZES["b"])
        unit(writer, "c", 0, SIZES["c"])
        sealed(writer)


@pytest.mark.usefixtures("direct")
def test_nobody_waits_for_a_hash_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_MOST", 2)
    monkeypatch.setattr(chunks, "_RESERVED", 1)

    def fail(self: FollowingDigest, *_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(FollowingDigest, "_catch_up", fail)
    with opened(tmp_path) as writer:
        for one in units():
            unit(writer, *one)
        with pytest.raises(OutputError, match="disk reported an error"):
            writer.seal()


@pytest.mark.usefixtures("direct")
def test_no_memory_for_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: chunks.Chunk) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(chunks.Chunk, "__init__", none)
    written(tmp_path)


@pytest.mark.parametrize("road", [KERNEL, MEMORY, None])
def test_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: int | None) -> None:
    take(monkeypatch, road)
    source = tmp_path / "source"
    source.write_bytes(b"before" + DATA["a"].numpy().tobytes())

    def copied(start: int) -> None:
        stop = min(start + UNIT, SIZES["a"])
        with writer.part(final=True) as part:
            part.copy("a", start, stream.fileno(), start + 6, nbytes=stop - start)

    with opened(tmp_path) as writer, source.open("rb") as stream:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(copied, range(0, SIZES["a"], UNIT)))
        unit(writer, "b", 0, SIZES["b"])
        unit(writer, "c", 0, SIZES["c"])
        sealed(writer)


@pytest.mark.parametrize("road", [KERNEL, MEMORY])
def test_a_source_that_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: int
) -> None:
    take(monkeypatch, road)
    source = tmp_path / "source"
    source.write_bytes(bytes(CHUNK_BYTES))
    with opened(tmp_path) as writer, source.open("rb") as stream:  # noqa: SIM117
        with pytest.raises(EOFError), writer.part(final=True) as part:
            part.copy("a", 0, stream.fileno(), 0, nbytes=SIZES["a"])


def test_a_small_file_has_one_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_LARGE", len(EXPECTED) + 1)
    seen = watched(monkeypatch)
    written(tmp_path)
    assert not any(past for past, _, _ in seen)
