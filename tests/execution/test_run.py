"""Plans to files: every operation against float64, and the same bytes whatever the threads."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch

from dora_convert.core.adapter import MagnitudeAxis, TokenRows
from dora_convert.core.plan import Cast, Copy, Merge, PatchRows, Piece, Plan, Shard
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.errors import InputError, MismatchError, OutputError
from dora_convert.execution import units
from dora_convert.execution.lanes import Buffers
from dora_convert.execution.run import _abreast as abreast
from dora_convert.execution.run import run
from dora_convert.execution.units import Unit
from dora_convert.storage import channel, chunks
from dora_convert.storage import parts as parts_of_files
from dora_convert.storage.header import layout
from dora_convert.storage.pickled import read_pickle_header
from dora_convert.storage.roads import Roads

from .conftest import KINDS, Recorder, Store, exact, module, operands, plan_of, random, written


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a unit and several units a tensor, also for small tensors."""
    monkeypatch.setattr(Buffers, "block_bytes", 1000)
    monkeypatch.setattr(units, "_UNIT_BYTES", 3000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("axis", MagnitudeAxis)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(37, 53), (1, 5), (64, 1), (3, 700)])
def test_merge(
    tmp_path: Path, store: Store, axis: MagnitudeAxis, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, parts = random(*shape, seed=9, dtype=dtype), operands(*shape, axis)
    base, refs = store(w=weight), store("adapter.safetensors", **parts)
    op = Merge(base["w"], (Piece(0, shape[0], module(refs, axis)),))
    plan = plan_of({"w": (op, KINDS[dtype], shape)})

    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        listener = Recorder()
        run(plan, folder, workers=workers, listener=listener)
        assert listener.nbytes == listener.total == plan.nbytes
        assert listener.files == ["model.safetensors"]

    one, three = (tmp_path / n / "model.safetensors" for n in "13")
    assert one.read_bytes() == three.read_bytes()
    dim = 1 if axis is MagnitudeAxis.OUT else 0
    expected = exact(weight, **parts, dim=dim)
    got = written(tmp_path / "1")["w"]
    assert got.dtype is dtype
    error = (got.double() - expected).abs()
    assert bool((error <= torch.finfo(dtype).eps * expected.abs() * 0.5001 + 1e-6).all())


@pytest.mark.usefixtures("small_blocks")
def test_fused_tensor_with_a_gap_and_a_module_cut_in_two(tmp_path: Path, store: Store) -> None:
    """Rows 0:10 and 20:30 of a fused tensor are adapted, 10:20 are not; the second module goes
    on in another tensor.
    """
    fused, rest = random(30, 50, seed=5), random(15, 50, seed=6)
    first, second = operands(10, 50, MagnitudeAxis.OUT), operands(25, 50, MagnitudeAxis.OUT)
    base = store(fused=fused, rest=rest)
    one = module(store("one.safetensors", **first))
    two = module(store("two.safetensors", **second))
    plan = plan_of(
        {
            "fused": (
                Merge(base["fused"], (Piece(0, 10, one), Piece(20, 30, two))),
                DType.F32,
                (30, 50),
            ),
            "rest": (Merge(base["rest"], (Piece(0, 15, two, offset=10),)), DType.F32, (15, 50)),
        }
    )
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", workers=2, listener=Recorder())

    got = written(tmp_path / "out")
    whole = exact(torch.cat([fused[20:], rest]), **second)
    torch.testing.assert_close(
        got["fused"][:10].double(), exact(fused[:10], **first), rtol=1e-6, atol=1e-7
    )
    assert torch.equal(got["fused"][10:20], fused[10:20])
    torch.testing.assert_close(got["fused"][20:].double(), whole[:10], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got["rest"].double(), whole[10:], rtol=1e-6, atol=1e-7)


def test_a_pickled_base_gives_the_same_bytes(tmp_path: Path, store: Store) -> None:
    weight, bias = random(20, 30, dtype=torch.bfloat16), random(7)
    parts = operands(20, 30, MagnitudeAxis.OUT)
    torch.save({"w": weight, "b": bias}, tmp_path / "base.bin")
    adapter = store("adapter.safetensors", **parts)

    def merged(base: dict[str, TensorRef], folder: Path) -> bytes:
        folder.mkdir()
        op = Merge(base["w"], (Piece(0, 20, module(adapter)),))
        plan = plan_of({"w": (op, DType.BF16, (20, 30)), "b": (Copy(base["b"]), DType.F32, (7,))})
        run(plan, folder, workers=2, listener=Recorder())
        return (folder / "model.safetensors").read_bytes()

    pickled = merged(read_pickle_header(tmp_path / "base.bin"), tmp_path / "p")
    assert pickled == merged(store(w=weight, b=bias), tmp_path / "s")


@pytest.mark.usefixtures("small_blocks")
def test_copies_casts_and_patched_rows(tmp_path: Path, store: Store) -> None:
    weight, rows = random(40, 30, seed=7), random(2, 30, seed=8)
    scalar, empty = torch.tensor(3.5), torch.empty(0, 4)
    integers = torch.arange(3000, dtype=torch.int64)
    base = store(w=weight, s=scalar, e=empty, i=integers)
    patch = TokenRows((39, 2), store("rows.safetensors", r=rows)["r"])
    plan = plan_of(
        {
            "copied": (Copy(base["w"]), DType.F32, (40, 30)),
            "cast": (Cast(base["w"]), DType.BF16, (40, 30)),
            "patched": (PatchRows(base["w"], patch), DType.F32, (40, 30)),
            "patched_cast": (PatchRows(base["w"], patch), DType.F16, (40, 30)),
            "scalar": (Copy(base["s"]), DType.F32, ()),
            "scalar_cast": (Cast(base["s"]), DType.F16, ()),
            "empty": (Copy(base["e"]), DType.F32, (0, 4)),
            "integers": (Copy(base["i"]), DType.I64, (3000,)),
        }
    )
    (tmp_path / "out").mkdir()
    listener = Recorder()
    run(plan, tmp_path / "out", workers=2, listener=listener)

    got = written(tmp_path / "out")
    patched = weight.clone()
    patched[39], patched[2] = rows[0], rows[1]
    assert torch.equal(got["copied"], weight)
    assert torch.equal(got["cast"], weight.bfloat16())
    assert torch.equal(got["patched"], patched)
    assert torch.equal(got["patched_cast"], patched.half())
    assert got["scalar"].item() == got["scalar_cast"].item() == 3.5
    assert got["empty"].shape == (0, 4)
    assert torch.equal(got["integers"], integers)
    assert listener.nbytes == plan.nbytes


def test_a_shard_without_data_is_written_too(tmp_path: Path, store: Store) -> None:
    base = store(e=torch.empty(0, 4), w=random(3, 4))
    shards = plan_of({"e": (Copy(base["e"]), DType.F32, (0, 4))}).shards
    other = Shard("other.safetensors", plan_of({"w": (Copy(base["w"]), DType.F32, (3, 4))}).jobs)
    (tmp_path / "out").mkdir()
    run(Plan((*shards, other), ()), tmp_path / "out", workers=1, listener=Recorder())
    assert written(tmp_path / "out")["e"].shape == (0, 4)
    assert (tmp_path / "out" / "other.safetensors").exists()


def test_all_undefined_rows_are_reported_together(tmp_path: Path, store: Store) -> None:
    zero, broken = random(8, 6), random(8, 6)
    zero[2:4] = 0
    broken[1, 0] = torch.nan
    parts = {**operands(8, 6, MagnitudeAxis.OUT)}
    parts["up"][2:4] = 0
    base, refs = store(zero=zero, broken=broken), store("adapter.safetensors", **parts)
    pieces = (Piece(0, 8, module(refs)),)
    plan = plan_of(
        {
            "zero": (Merge(base["zero"], pieces), DType.F32, (8, 6)),
            "broken": (Merge(base["broken"], pieces), DType.F32, (8, 6)),
            "wide": (Cast(store("c.safetensors", c=torch.tensor([1e5]))["c"]), DType.F16, (1,)),
        }
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(MismatchError) as caught:
        run(plan, tmp_path / "out", workers=2, listener=Recorder())
    text = "\n".join(caught.value.problems)
    assert "zero: 2 rows are zero" in text
    assert "broken: 1 rows are NaN" in text
    assert "wide: 1 values are too large" in text
    assert "--zero-rows keep" in caught.value.hint


def test_zero_rows_can_be_kept(tmp_path: Path, store: Store) -> None:
    weight, parts = random(8, 6), operands(8, 6, MagnitudeAxis.OUT)
    weight[2], parts["up"][2] = 0, 0
    base, refs = store(w=weight), store("adapter.safetensors", **parts)
    op = Merge(base["w"], (Piece(0, 8, module(refs)),))
    plan = plan_of({"w": (op, DType.F32, (8, 6))})
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", workers=1, listener=Recorder(), keep_zero_rows=True)
    got = written(tmp_path / "out")["w"]
    assert not got[2].any()
    assert bool(torch.isfinite(got).all())


def test_a_full_disk_stops_every_thread(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, parts = random(50, 40), operands(50, 40, MagnitudeAxis.OUT)
    base, refs = store(w=weight), store("adapter.safetensors", **parts)
    op = Merge(base["w"], (Piece(0, 50, module(refs)),))
    plan = plan_of({"w": (op, DType.F32, (50, 40))})
    write, calls = os.pwrite, []

    def full(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "full")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="no space"):
        run(plan, tmp_path / "out", workers=2, listener=Recorder())


def test_an_fsync_that_fails_is_no_success(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = store(w=random(3, 4))
    plan = plan_of({"w": (Copy(base["w"]), DType.F32, (3, 4))})

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    (tmp_path / "out").mkdir()
    listener = Recorder()
    with pytest.raises(OutputError):
        run(plan, tmp_path / "out", workers=1, listener=listener)
    assert listener.files == []


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large files are written."""
    monkeypatch.setattr(channel, "_LARGE", 0)
    monkeypatch.setattr(parts_of_files, "_COLLECTED", 1)
    for module_of in (chunks, parts_of_files):
        monkeypatch.setattr(module_of, "CHUNK_BYTES", 4096)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("way", ["plainly", "in_chunks"])
def test_hashes_are_those_of_sha256sum(
    tmp_path: Path, store: Store, workers: int, way: str, request: pytest.FixtureRequest
) -> None:
    """Also of rows that are patched once they are copied, and of files without data."""
    if way == "in_chunks":
        request.getfixturevalue(way)
    weight, parts = random(300, 40), operands(300, 40, MagnitudeAxis.IN)
    base, refs = store(w=weight, e=torch.empty(0, 4)), store("adapter.safetensors", **parts)
    rows = tuple(range(250, 0, -9))
    patch = TokenRows(rows, store("rows.safetensors", r=random(28, 40))["r"])
    merge = Merge(base["w"], (Piece(0, 300, module(refs, MagnitudeAxis.IN)),))
    by_file = {
        "one": {"copied": (Copy(base["w"]), DType.F32, (300, 40))},
        "two": {
            "merged": (merge, DType.F32, (300, 40)),
            "patched": (PatchRows(base["w"], patch), DType.F32, (300, 40)),
        },
        "empty": {"e": (Copy(base["e"]), DType.F32, (0, 4))},
    }
    shards = [Shard(file, plan_of(ops).shards[0].jobs) for file, ops in by_file.items()]
    (tmp_path / "out").mkdir()
    result = run(Plan(tuple(shards), ()), tmp_path / "out", workers=workers, listener=Recorder())
    lines = "".join(f"{sha256}  {file}\n" for file, sha256 in result.sha256.items())
    assert set(result.sha256) == set(by_file)
    check = ["sha256sum", "--check", "--strict", "-"]
    subprocess.run(check, cwd=tmp_path / "out", input=lines, text=True, check=True)


@pytest.mark.parametrize("op", [Copy, Merge])
def test_a_base_that_shrinks_while_it_is_read(tmp_path: Path, store: Store, op: type) -> None:
    base = store(w=random(50, 40))
    refs = store("adapter.safetensors", **operands(50, 40, MagnitudeAxis.OUT))
    work = Copy(base["w"]) if op is Copy else Merge(base["w"], (Piece(0, 50, module(refs)),))
    plan = plan_of({"w": (work, DType.F32, (50, 40))})
    os.truncate(tmp_path / "base.safetensors", 3000)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="became shorter"):
        run(plan, tmp_path / "out", workers=2, listener=Recorder())


def test_tensors_are_written_in_the_order_of_their_file(store: Store) -> None:
    """Not in that of the base's header: what is written from the front on is hashed as it comes."""
    kinds = {"b": DType.F32, "c": DType.F16, "a": DType.F16, "d": DType.F64}
    base = store(w=random(4, 4))["w"]
    plan = plan_of({name: (Cast(base), kind, (4, 4)) for name, kind in kinds.items()})
    specs = plan.shards[0].specs
    starts = layout(specs).starts
    found = [unit.job.output.name for unit in units.units(plan)]
    assert found == sorted(found, key=lambda name: starts[name]) == ["d", "b", "a", "c"]
    assert [spec.name for spec in specs] == list(kinds)


def test_two_files_grow_at_a_time(store: Store) -> None:
    """Each from its front on; the next begins where one is complete."""
    job = plan_of({"w": (Copy(store(w=random(9, 1))["w"]), DType.F32, (9, 1))}).shards[0].jobs[0]
    shards = (0, 0, 0, 1, 2, 2, 3, 3)
    work = [(i, Unit(shard, job, i, i + 1)) for i, shard in enumerate(shards)]
    assert [i for i, _ in abreast(work, 2)] == [0, 3, 1, 4, 2, 5, 6, 7]
    assert abreast(work, 1) == work


@pytest.mark.usefixtures("in_chunks")
def test_a_base_that_cannot_be_copied(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk failed, not that of the output."""
    base = store(w=random(500, 40))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Roads, "next", lambda _: 1)
    monkeypatch.setattr(os, "preadv", broken)
    (tmp_path / "out").mkdir()
    plan = plan_of({"w": (Copy(base["w"]), DType.F32, (500, 40))})
    with pytest.raises(InputError, match=r"base\.safetensors cannot be read: the disk"):
        run(plan, tmp_path / "out", workers=1, listener=Recorder())


def test_bytes_pass_through_memory_where_the_kernel_cannot_copy(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(500, 40)
    base = store(w=weight)

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "other device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "out").mkdir()
    plan = plan_of({"w": (Copy(base["w"]), DType.F32, (500, 40))})
    run(plan, tmp_path / "out", workers=1, listener=Recorder())
    assert torch.equal(written(tmp_path / "out")["w"], weight)


def test_plain_lora_and_magnitude_only(tmp_path: Path, store: Store) -> None:
    weight, parts = random(12, 7), operands(12, 7, MagnitudeAxis.OUT)
    base, refs = store(w=weight), store("adapter.safetensors", **parts)
    dora = module(refs)
    lora = module({k: v for k, v in refs.items() if k != "m"})
    only = type(dora)("layer", None, refs["m"], MagnitudeAxis.OUT, 1.0)
    plan = plan_of(
        {
            "lora": (Merge(base["w"], (Piece(0, 12, lora),)), DType.F32, (12, 7)),
            "only": (Merge(base["w"], (Piece(0, 12, only),)), DType.F32, (12, 7)),
        }
    )
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", workers=1, listener=Recorder())
    got = written(tmp_path / "out")
    update = 0.5 * parts["up"].double() @ parts["down"].double()
    torch.testing.assert_close(got["lora"].double(), weight.double() + update, rtol=1e-6, atol=1e-7)
    expected = exact(weight, parts["up"], parts["down"], parts["m"], scaling=0.0)
    torch.testing.assert_close(got["only"].double(), expected, rtol=1e-6, atol=1e-7)


def test_a_model_larger_than_memory_leaves_the_page_cache(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard that is written, and what was read for it, once it is on the disk."""
    weight, parts = random(8, 6), operands(8, 6, MagnitudeAxis.OUT)
    base, refs = store(w=weight, c=random(5)), store("adapter.safetensors", **parts)
    merge = (Merge(base["w"], (Piece(0, 8, module(refs)),)), DType.F32, (8, 6))
    plan = plan_of({"w": merge, "c": (Copy(base["c"]), DType.F32, (5,))})
    told: list[tuple[str, int]] = []

    def drop(spans: list[tuple[Path, int, int]]) -> None:
        told.extend((file.name, end - begin) for file, begin, end in spans)

    monkeypatch.setattr("dora_convert.execution.run.drop", drop)
    for larger in (False, True):
        monkeypatch.setattr("dora_convert.execution.run.is_larger_than_memory", lambda _: larger)  # noqa: B023
        folder = tmp_path / str(larger)
        folder.mkdir()
        run(plan, folder, workers=1, listener=Recorder())
        size = (folder / "model.safetensors").stat().st_size
        read = {("base.safetensors", 192), ("base.safetensors", 20)}
        assert set(told) == ({("model.safetensors", size), *read} if larger else set())
