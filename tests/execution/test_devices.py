"""The way to a device and back, and the arithmetic there, with a stand-in for it and its queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_convert import quant
from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.plan import Cast, Copy, Job, Merge, Piece, Plan, Quantise, ScaleBias, Shard
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError, MismatchError, OutputError
from dora_convert.execution import units
from dora_convert.execution.devices import DirectTransport, lanes, named, pays
from dora_convert.execution.lanes import BLOCK_BYTES, Buffers, DeviceBuffers
from dora_convert.execution.operands import Operands
from dora_convert.execution.run import run
from dora_convert.maths.deltas import Dense, Hadamard, Kronecker, LowRank
from dora_convert.maths.dora import RowFaults, overflows, scale_by, scale_rows
from tests.elsewhere import ELSEWHERE, MixedDevicesError, Queue

from .conftest import KINDS, Recorder, Store, exact, module, operands, plan_of, random, written

CPU = torch.device("cpu")


class Scarce(DeviceBuffers):
    """A device on which no more than `room` bytes of a block find place."""

    room = 0

    def upload(self, kind: str, stored: Tensor) -> Tensor:
        block = super().upload(kind, stored)
        if stored.nbytes > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return block


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_UNIT_BYTES", 9000)
    monkeypatch.setattr(Buffers, "block_bytes", 1000)


@pytest.fixture(params=[DType.BF16, DType.F16, DType.F32], ids=lambda kind: kind.label)
def subject(request: pytest.FixtureRequest, store: Store) -> tuple[Plan, dict[str, Tensor]]:
    """Every kind of operation that goes through a device, on both axes; and exact results."""
    kind: DType = request.param
    dtype = next(t for t, k in KINDS.items() if k is kind)
    weight, bias = random(90, 60, seed=5, dtype=dtype), random(90, seed=6, dtype=dtype)
    out, into = (operands(90, 60, axis) for axis in (MagnitudeAxis.OUT, MagnitudeAxis.IN))
    base = store(w=weight, b=bias)
    by_row = (Piece(0, 90, module(store("out.safetensors", **out), MagnitudeAxis.OUT)),)
    by_column = (Piece(0, 90, module(store("in.safetensors", **into), MagnitudeAxis.IN)),)
    plan = plan_of(
        {
            "rows": (Merge(base["w"], by_row), kind, (90, 60)),
            "columns": (Merge(base["w"], by_column), kind, (90, 60)),
            "cast": (Cast(base["w"]), DType.F16, (90, 60)),
            "copied": (Copy(base["w"]), kind, (90, 60)),
            "bias": (ScaleBias(base["b"], base["w"], by_row), kind, (90,)),
        }
    )
    expected = {
        "rows": exact(weight, **out),
        "columns": exact(weight, **into, dim=0),
        "cast": weight.half().double(),
        "copied": weight.double(),
    }
    return plan, expected


def executed(plan: Plan, folder: Path, make: Callable[[], Buffers], *, workers: int = 2) -> bytes:
    folder.mkdir()
    run(plan, folder, workers=workers, listener=Recorder(), lanes=make)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("small_units")
def test_a_device_gives_the_cpus_bytes(
    tmp_path: Path, subject: tuple[Plan, dict[str, Tensor]]
) -> None:
    plan, expected = subject
    queues: list[Queue] = []

    def make() -> Buffers:
        queues.append(Queue())
        return DeviceBuffers(queues[-1], 1000)

    ours = executed(plan, tmp_path / "device", make)
    assert ours == executed(plan, tmp_path / "cpu", Buffers)
    for name, values in expected.items():
        got = written(tmp_path / "device")[name]
        step = torch.finfo(got.dtype).eps * values.abs()
        assert bool(((got.double() - values).abs() <= 0.5001 * step + 1e-6).all()), name
    assert sum(len(queue.waiting) for queue in queues) > 40


@pytest.mark.parametrize("broken", ["landing", "finish"])
def test_the_stand_in_notices_a_missing_wait(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Buffers that do not wait for the queue are found out."""
    monkeypatch.setattr(units, "_UNIT_BYTES", 9000)

    class Hasty(DeviceBuffers):
        def landing(self, kind: str, nbytes: int) -> Tensor:
            if broken == "landing":
                return self._host.take(kind, nbytes)
            return super().landing(kind, nbytes)

        def _put_oldest(self) -> str:
            slot = next(iter(self._sent))
            wait, parcels = self._sent.pop(slot)
            if broken != "finish":
                wait()
            for data, put in parcels:
                put(data)
            return slot

    weight, parts = random(90, 60, seed=5), operands(90, 60, MagnitudeAxis.OUT)
    base = store(w=weight)
    pieces = (Piece(0, 90, module(store("a.safetensors", **parts))),)
    plan = plan_of({"w": (Merge(base["w"], pieces), DType.F32, (90, 60))})

    def wrong() -> bool:
        executed(plan, tmp_path / "out", lambda: Hasty(Queue(), 1000), workers=1)
        got = written(tmp_path / "out")["w"].double()
        return not torch.allclose(got, exact(weight, **parts), rtol=1e-5, atol=1e-6)

    if broken == "landing":
        with pytest.raises(AssertionError, match="while on its way"):
            wrong()
    else:
        assert wrong()


def test_blocks_shrink_until_they_find_place(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scarce, "room", 3 << 20)
    weight, parts = random(4000, 1500, seed=5), operands(4000, 1500, MagnitudeAxis.OUT)
    base = store(w=weight)
    pieces = (Piece(0, 4000, module(store("a.safetensors", **parts))),)
    plan = plan_of({"w": (Merge(base["w"], pieces), DType.F32, (4000, 1500))})
    made = Scarce(Queue(), 16 << 20)
    executed(plan, tmp_path / "out", lambda: made, workers=1)

    assert made.block_bytes == 2 << 20
    error = (written(tmp_path / "out")["w"].double() - exact(weight, **parts)).abs()
    assert error.max() < 1e-6


def test_a_device_that_is_too_small_is_told(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scarce, "room", 100)
    base = store(w=random(90, 60, seed=5))
    pieces = (Piece(0, 90, module(store("a.safetensors", **operands(90, 60, MagnitudeAxis.OUT)))),)
    plan = plan_of({"w": (Merge(base["w"], pieces), DType.F32, (90, 60))})
    with pytest.raises(OutputError, match="memory does not suffice"):
        executed(plan, tmp_path / "out", lambda: Scarce(Queue(), 4 << 20), workers=1)


def test_undefined_rows_are_counted_on_a_device_too(tmp_path: Path, store: Store) -> None:
    weight, parts = random(8, 6, seed=5), operands(8, 6, MagnitudeAxis.OUT)
    weight[2:4], parts["up"][2:4] = 0, 0
    weight[5, 0] = torch.nan
    base = store(w=weight)
    pieces = (Piece(0, 8, module(store("a.safetensors", **parts))),)
    plan = plan_of({"w": (Merge(base["w"], pieces), DType.F32, (8, 6))})
    with pytest.raises(MismatchError) as caught:
        executed(plan, tmp_path / "out", lambda: DeviceBuffers(Queue(), BLOCK_BYTES))
    assert "w: 2 rows are zero" in "\n".join(caught.value.problems)
    assert "w: 1 rows are NaN" in "\n".join(caught.value.problems)


def test_the_arithmetic_stays_on_the_device_and_waits_for_nothing() -> None:
    """Tensors without values raise wherever a value would have to be known, or devices mix."""
    rows = torch.empty(8, 6, device="meta")
    pair = LowRank(torch.empty(8, 4), torch.empty(4, 6))
    small = LowRank(torch.empty(2, 1), torch.empty(1, 3))
    others = Hadamard(pair, pair), Kronecker(Dense(torch.empty(4, 2)), small, 0, 8)
    magnitude = torch.empty(8)
    for delta in (pair, *others):
        there = Operands(delta, magnitude).on(rows.device)
        assert there.delta is not None
        assert there.magnitude is not None
        there.delta.add_to(rows, 0)
        faults = scale_rows(rows, there.magnitude)
    faults += scale_by(rows, torch.empty(6, device="meta"))
    faults += overflows(rows, rows.half())
    for count in (faults.zero, faults.nonfinite, faults.overflow):
        assert isinstance(count, Tensor)
        assert count.device.type == "meta"
    with pytest.raises(RuntimeError, match="device"):
        pair.add_to(rows, 0)
    with pytest.raises(RuntimeError, match="meta"):
        bool(faults)


def test_counts_of_a_device_become_numbers() -> None:
    late = RowFaults(zero=torch.tensor(2), nonfinite=0) + RowFaults(zero=1, overflow=5)
    assert late.settled() == RowFaults(zero=3, overflow=5)
    assert isinstance(late.settled().zero, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu", "'gpu' is no device"),
        ("meta", "merging on meta is not supported"),
        ("cuda:7", "there is no device cuda:7"),
        ("cpu,cuda:9", "there is no device cuda:9"),
    ],
)
def test_devices_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        named(text, Plan((), ()), workers=2)
    assert caught.value.hint


def test_a_device_without_float64_takes_bfloat16_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    pieces = (Piece(0, 9, module(store("a.safetensors", **operands(9, 6, MagnitudeAxis.OUT)))),)

    def plan(dtype: torch.dtype) -> Plan:
        base = store(f"{KINDS[dtype].label}.safetensors", w=random(9, 6, seed=5, dtype=dtype))
        return plan_of({"w": (Merge(base["w"], pieces), KINDS[dtype], (9, 6))})

    assert [d.type for d in named("mps", plan(torch.bfloat16), workers=2)] == ["mps"]
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(InputError, match="float64"):
            named("mps", plan(dtype), workers=2)


def test_what_mps_lacks_is_said_before(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows are float64 whatever the weights are; floats of 8 bits it does not know."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    base = store("b.safetensors", w=random(128, 128, seed=5, dtype=torch.bfloat16))["w"]
    into = operands(128, 128, MagnitudeAxis.IN)
    pieces = (Piece(0, 128, module(store("a.safetensors", **into), MagnitudeAxis.IN)),)
    with pytest.raises(InputError, match="float64"):
        named("mps", plan_of({"w": (Merge(base, pieces), DType.BF16, (128, 128))}), workers=2)

    def into_scheme(name: str) -> Plan:
        spec = TensorSpec("w", DType.BF16, (128, 128))
        job = Job(Quantise(base, (), name, quant.writable(name).layout(spec)), spec)
        return Plan((Shard("model.safetensors", (job,)),), ())

    with pytest.raises(InputError, match="8 bits"):
        named("mps", into_scheme("fp8"), workers=2)
    assert named("mps", into_scheme("w8a8"), workers=2)


def test_without_another_device_the_cpu_is_chosen() -> None:
    assert [device.type for device in named("auto", Plan((), ()), workers=2)] == ["cpu"]


@pytest.mark.parametrize(
    ("disk", "host", "device", "expected"),
    [
        (10e9, 2e9, 8e9, True),
        (1e9, 2e9, 8e9, False),  # the disk is the limit for both
        (10e9, 2e9, 2.1e9, False),  # not worth it
        (10e9, 2e9, 1e9, False),
        (2.5e9, 2e9, 8e9, True),
    ],
)
def test_a_device_has_to_pay(disk: float, host: float, device: float, expected: bool) -> None:
    assert pays(100 << 30, disk=disk, host=host, device=device) is expected


def test_workers_take_turns_on_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """And share the memory that they may use."""
    monkeypatch.setattr("dora_convert.execution.devices.CudaTransport", DirectTransport)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    make = lanes([first, second], workers=4, max_memory=100 << 20)
    made = [make() for _ in range(4)]
    assert [lane.device for lane in made] == [first, second, first, second]
    assert {lane.block_bytes for lane in made} == {(100 << 20) // 32}
    large = lanes([first], workers=1, max_memory=1 << 40)()
    assert large.block_bytes == 16 << 20
    assert type(lanes([CPU], workers=1, max_memory=None)()) is Buffers


def test_the_stand_in_refuses_what_a_device_would() -> None:
    queue, other = Queue(), Queue()
    with queue:
        there = torch.ones(3, 2, device=ELSEWHERE)
        assert (there * 2 + torch.tensor(1)).device == ELSEWHERE  # a number may come from the host
        assert not queue.waits
        for mixed in (lambda: there + torch.ones(2), lambda: there[torch.arange(2)]):
            with pytest.raises(MixedDevicesError, match="mixes"):
                mixed()
        assert there.cpu().tolist() == torch.ones(3, 2).tolist()
        assert int(there.sum()) == 6
        assert len(queue.waits) == 2
    with other, pytest.raises(MixedDevicesError, match="another queue"):
        there.add_(1)
    with pytest.raises(MixedDevicesError, match="outside"):
        there.cpu()
