"""Quantised checkpoints on a device: decoded and quantised there, to the CPU's bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from torch import Tensor

from dora_convert import quant
from dora_convert.api.bases import open_base
from dora_convert.api.reading import ReadOptions
from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.plan import Cast, Job, Merge, Piece, Plan, Quantise, Shard
from dora_convert.core.tensors import DType, Encoded, TensorRef, TensorSpec
from dora_convert.execution import lanes, survival, units
from dora_convert.execution.bench import dropped
from dora_convert.execution.decoding import as_trained, decoded, open_reader
from dora_convert.execution.lanes import Buffers, DeviceBuffers
from dora_convert.execution.run import RunResult, run
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.journal import Sealed
from tests.elsewhere import Queue
from tests.quant.engine import WRITABLE, normal, scheme, write
from tests.quant.gguf_files import random_blocks, write_config, write_tensors
from tests.quant.test_awq import CONFIG as AWQ
from tests.quant.test_awq import checkpoint as awq
from tests.quant.test_gptq import checkpoint as gptq
from tests.quant.test_libraries import case, names

from .conftest import Recorder, Store, module, operands, plan_of, random

BLOCK = 20_000
SMALLEST = 1 << 16


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_UNIT_BYTES", 70_000)
    monkeypatch.setattr(Buffers, "block_bytes", BLOCK)
    monkeypatch.setattr(survival, "_STRIPE_BYTES", 4_000)


class Lanes:
    """Makes buffers for a stand-in device, and keeps their queues."""

    def __init__(self, block_bytes: int = BLOCK) -> None:
        self.queues: list[Queue] = []
        self._block_bytes = block_bytes

    def __call__(self) -> Buffers:
        self.queues.append(Queue())
        return DeviceBuffers(self.queues[-1], self._block_bytes)

    @property
    def copies(self) -> int:
        return sum(len(queue.waiting) for queue in self.queues)


def executed(
    plan: Plan, folder: Path, make: Callable[[], Buffers], *, workers: int = 2
) -> tuple[RunResult, bytes]:
    folder.mkdir()
    result = run(plan, folder, workers=workers, listener=Recorder(), lanes=make)
    return result, (folder / "model.safetensors").read_bytes()


def quantised(
    store: Store, name: str, axis: MagnitudeAxis = MagnitudeAxis.OUT, dtype: DType = DType.BF16
) -> Plan:
    """Two weights that share a statistic where a scheme fuses, each under an adapter in part."""
    shape, kind = (200, 256), {DType.BF16: torch.bfloat16, DType.F16: torch.float16}[dtype]
    scheme_of = quant.writable(name)
    jobs = []
    for i, leaf in enumerate(("gate_proj", "up_proj", "o_proj")):
        spec = TensorSpec(f"m.{leaf}.weight", dtype, shape)
        base = store(f"{leaf}.safetensors", w=normal(*shape, dtype=kind, seed=i))["w"]
        adapter = store(f"{leaf}-a.safetensors", **operands(*shape, axis))
        by_row = (Piece(0, 77, module(adapter)), Piece(130, 200, module(adapter), 130))
        whole = (Piece(0, 200, module(adapter, axis)),)
        pieces = by_row if axis is MagnitudeAxis.OUT else whole
        jobs.append(
            Job(Quantise(base, pieces if i < 2 else (), name, scheme_of.layout(spec)), spec)
        )
    return Plan((Shard("model.safetensors", tuple(jobs)),), ())


@pytest.mark.parametrize("axis", list(MagnitudeAxis), ids=lambda axis: axis.name)
@pytest.mark.parametrize("name", WRITABLE)
def test_it_is_quantised_there(
    name: str, axis: MagnitudeAxis, store: Store, tmp_path: Path
) -> None:
    plan, made = quantised(store, name, axis), Lanes()
    there, device = executed(plan, tmp_path / "device", made)
    here, host = executed(plan, tmp_path / "cpu", Buffers)
    assert device == host
    assert there.survival == here.survival
    assert there.survival is not None
    assert made.copies >= 18


@pytest.mark.parametrize("name", [name for name in WRITABLE if not scheme(name).two_pass])
def test_no_block_is_waited_for(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, the waits are the unit's, but for rows that are measured."""
    monkeypatch.setattr(survival.Meter, "spans", lambda *_: [])
    monkeypatch.setattr(units, "_UNIT_BYTES", 1 << 20)
    plan, found = quantised(store, name), []
    for size in (1 << 20, 20_000):
        made = Lanes(size)
        executed(plan, tmp_path / str(size), made)
        found.append((made.copies, Counter(wait for q in made.queues for wait in q.waits)))
    assert found[1][0] > found[0][0]
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("name", ["w8a8", "nf4_dq", "nvfp4a16"])
def test_untouched_weights_too(name: str, store: Store, tmp_path: Path) -> None:
    """In a type that is not widened, as the scheme's own library computes."""
    plan = quantised(store, name, dtype=DType.F16)
    _, device = executed(plan, tmp_path / "device", Lanes())
    assert device == executed(plan, tmp_path / "cpu", Buffers)[1]


@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w8a8", "fp8_dynamic", "mlx"])
def test_scales_are_folded_there(name: str, store: Store, tmp_path: Path) -> None:
    """Of a base in the same scheme, which is decoded there as well."""
    weight = normal(128, 256)
    base = checkpoint(tmp_path, scheme(name).config([]), write(scheme(name), weight))
    plan = folded(base.tensors["a.weight"], name, store)
    there, device = executed(plan, tmp_path / "device", Lanes())
    here, host = executed(plan, tmp_path / "cpu", Buffers)
    assert device == host
    assert there.survival == here.survival


def folded(ref: TensorRef, name: str, store: Store) -> Plan:
    assert isinstance(ref.source, Encoded)
    adapter = store("adapter.safetensors", **operands(*ref.spec.shape, MagnitudeAxis.OUT))
    pieces = (Piece(0, ref.spec.shape[0], module(adapter)),)
    folds: tuple[str, ...] = getattr(scheme(name), "folds", ())
    scales = {role: ref.source.parts[role] for role in folds}
    op = Quantise(ref, pieces, name, scheme(name).layout(ref.spec), scales)
    return Plan((Shard("model.safetensors", (Job(op, ref.spec),)),), ())


def checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Checkpoint:
    folder = folder / "base"
    folder.mkdir()
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return decoded(open_checkpoint(folder))


def stored() -> list[Any]:
    """Config and tensors of one weight in every scheme and variant that there is."""
    found = [
        pytest.param(scheme(n).config([]), write(scheme(n), normal(128, 256)), id=n)
        for n in WRITABLE
    ]
    experts = normal(3, 64, 8)
    mxfp4 = scheme("mxfp4")
    layout = mxfp4.layout(TensorSpec("a.experts.down_proj", DType.BF16, (3, 64, 8)))
    made = mxfp4.quantize(layout, experts.reshape(3, -1))
    parts = {layout.parts[role].name: tensor for role, tensor in made.items()}
    found.append(pytest.param(mxfp4.config([]), parts, id="mxfp4"))
    found.append(pytest.param(AWQ, awq(), id="awq"))
    for v2 in (False, True):
        config, tensors, _ = gptq(4, v2=v2, act_order=True)
        found.append(pytest.param(config, tensors, id=f"gptq {v2}"))
    for kind, name in names():
        config, tensors, _ = case(kind, name)
        found.append(pytest.param(config, tensors, id=f"{kind} {name}"))
    codes = normal(24, 64).to(torch.float8_e4m3fn)
    beside = {"a.scale_weight": torch.rand(24, generator=torch.Generator().manual_seed(1))}
    for label, extra in (("bare", {}), ("scaled", beside)):
        found.append(pytest.param({}, {"a.weight": codes, **extra}, id=f"scaled_fp8 {label}"))
    return found


def fetched(ref: TensorRef, step: int) -> tuple[Tensor, list[str]]:
    """All rows by way of a device, and what was waited for after the first block."""
    queue, rows, waits = Queue(), ref.spec.shape[0], 0
    buffers, back = DeviceBuffers(queue, BLOCK), torch.empty(ref.spec.numel)
    with queue.active(), open_reader().rows(ref) as blocks:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            got = blocks.fetch(start, stop, buffers).float().contiguous()
            place = back.view(rows, -1)[start:stop]
            assert got.shape == place.shape
            data = got.view(-1).view(torch.uint8)
            buffers.deliver([(data, place.view(-1).view(torch.uint8).copy_)])
            waits = waits if start else len(queue.waits)
        buffers.finish()
    return back.view(ref.spec.shape), queue.waits[waits:]


@pytest.mark.parametrize(("config", "tensors"), stored())
def test_it_is_decoded_there(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tmp_path: Path
) -> None:
    """Block after block without a wait; parts that belong to no row go there once."""
    for ref in checkpoint(tmp_path, config, tensors).tensors.values():
        assert isinstance(ref.source, Encoded)
        matrix = ref.matrix()
        with open_reader().rows(matrix) as blocks:
            want = blocks.read(0, matrix.spec.shape[0], torch.empty(0))
        for step in (8, 64):
            got, waits = fetched(matrix, step)
            assert torch.equal(got.view(torch.int32), want.float().view(torch.int32))
            assert waits == []


def test_every_scheme_is_seen() -> None:
    """But GGUF, which its library decodes on the host."""
    seen = {str(param.id).split()[0] for param in stored()}
    assert seen == set(quant.quantizers.names()) - {"gguf"}


def test_gguf_goes_there_as_it_is_decoded_here(tmp_path: Path) -> None:
    blocks = random_blocks(Kind.Q4_K, 24, 512)
    write_tensors(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (blocks, Kind.Q4_K)}, "llama")
    write_config(tmp_path)
    (ref,) = open_base(tmp_path, ReadOptions()).tensors.values()
    got, _ = fetched(ref, 7)
    assert torch.equal(got, open_reader().load(ref).float())


@pytest.mark.parametrize("name", ["nf4", "nf4_dq", "int8", "w4a16"])
def test_what_an_adapter_was_trained_on_is_made_there(
    name: str, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"m.q_proj.weight": normal(128, 256)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    for flip in (False, True):
        trained = as_trained(open_checkpoint(folder), name, transposed=lambda _, f=flip: f)
        ref = trained.tensors["m.q_proj.weight"]
        adapter = store(f"{flip}.safetensors", **operands(128, 256, MagnitudeAxis.OUT))
        pieces = (Piece(0, 128, module(adapter)),)
        plan = plan_of({"w": (Merge(ref, pieces), DType.BF16, (128, 256))})
        _, device = executed(plan, tmp_path / f"device {flip}", Lanes())
        assert device == executed(plan, tmp_path / f"cpu {flip}", Buffers)[1]


def test_a_quantised_base_to_dense_weights(store: Store, tmp_path: Path) -> None:
    base = checkpoint(tmp_path, scheme("nf4").config([]), write(scheme("nf4"), normal(200, 256)))
    ref = base.tensors["a.weight"]
    out, into = (store(f"{a.name}.safetensors", **operands(200, 256, a)) for a in MagnitudeAxis)
    plan = plan_of(
        {
            "rows": (Merge(ref, (Piece(0, 200, module(out)),)), DType.BF16, (200, 256)),
            "columns": (
                Merge(ref, (Piece(0, 200, module(into, MagnitudeAxis.IN)),)),
                DType.F16,
                (200, 256),
            ),
            "cast": (Cast(ref), DType.BF16, (200, 256)),
        }
    )
    _, device = executed(plan, tmp_path / "device", Lanes())
    assert device == executed(plan, tmp_path / "cpu", Buffers)[1]


class Kept:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.sealed: dict[str, Sealed] = {}
        self.entries: list[Sealed] = []

    def add(self, entry: Sealed) -> None:
        self.entries.append(entry)


class Filling(DeviceBuffers):
    """A device that is full now and then, in the middle of a unit."""

    seen = 0

    def upload(self, kind: str, stored: Tensor) -> Tensor:
        block = super().upload(kind, stored)
        self.seen += kind == "raw"
        if self.block_bytes > 2 * SMALLEST and self.seen in (3, 7):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return block


@pytest.mark.parametrize("name", ["w8a8", "nf4_dq", "nvfp4a16", None])
def test_a_unit_that_is_done_again_counts_once(
    name: str | None, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out when part of a unit is written: the same file, and the same figures."""
    monkeypatch.setattr(units, "_UNIT_BYTES", 64 << 20)
    monkeypatch.setattr(survival, "_STRIPE_BYTES", SMALLEST)
    monkeypatch.setattr(Buffers, "block_bytes", SMALLEST)
    monkeypatch.setattr(lanes, "BLOCK_BYTES", SMALLEST)
    shape = (16_000, 128)
    spec = TensorSpec("a.weight", DType.BF16, shape)
    base = store(w=normal(*shape))["w"]
    # Of whole numbers, so that products do not depend on how rows are cut into blocks.
    adapter = {
        "up": torch.ones(shape[0], 1),
        "down": torch.ones(1, shape[1]) / 64,
        "m": random(shape[0]).abs() + 0.5,
    }
    pieces = (Piece(0, shape[0], module(store("a.safetensors", **adapter))),)
    if name is None:
        plan = plan_of({"a.weight": (Merge(base, pieces), DType.BF16, shape)})
    else:
        job = Job(Quantise(base, pieces, name, scheme(name).layout(spec)), spec)
        plan = Plan((Shard("model.safetensors", (job,)),), ())
    made = Filling(Queue(), 8 * SMALLEST)
    found, files = [], []
    for label, make in (("device", lambda: made), ("cpu", Buffers)):
        folder, kept = tmp_path / label, Kept()
        folder.mkdir()
        run(plan, folder, workers=1, listener=Recorder(), lanes=make, journal=kept)
        files.append((folder / "model.safetensors").read_bytes())
        found.append([sums["layer"] for _, sums in kept.entries[0].found["survival"]])
    assert made.block_bytes == 2 * SMALLEST
    assert files[0] == files[1]
    assert len(found[0]) == (0 if name is None else 1)
    for there, here in zip(*found, strict=True):
        assert there[0] == here[0]  # how many elements were looked at
        # A statistic of the rows that are measured alone depends on how they are cut.
        assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.parametrize("name", ["w8a8", "nf4_dq", "nvfp4a16"])
def test_what_is_timed_is_done_there_and_forgotten(name: str, store: Store) -> None:
    """Whatever a first pass would have found: `auto` and `bench` leave that out."""
    made = Lanes()
    work = list(units.units(quantised(store, name)))
    assert dropped(work[:1], 1, made) > 0
    assert dropped(work, 2, made) > 0
    assert made.copies > 0
