"""What a merge did and when: in files and queues that do the same as without."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.plan import Copy, Merge, Piece, Plan
from dora_convert.core.reports import Activity
from dora_convert.core.tensors import DType
from dora_convert.execution import timeline as module_of_timeline
from dora_convert.execution import units
from dora_convert.execution.bench import stages
from dora_convert.execution.lanes import Buffers, DeviceBuffers
from dora_convert.execution.timed import TimedBuffers
from dora_convert.execution.timeline import Interval, Row, Timeline

from .conftest import Recorder, Store, module, operands, plan_of, random
from .test_devices import Queue

ROWS, COLUMNS = 90, 60  # float32: 21600 bytes; 4 rows are a block, 37 a unit
BLOCKS = 10 + 10 + 4


@pytest.fixture
def plan(store: Store, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(units, "_UNIT_BYTES", 9000)
    monkeypatch.setattr(Buffers, "block_bytes", 1000)
    base = store(w=random(ROWS, COLUMNS, seed=5), c=random(50))
    parts = store("a.safetensors", **operands(ROWS, COLUMNS, MagnitudeAxis.OUT))
    pieces = (Piece(0, ROWS, module(parts)),)
    return plan_of(
        {
            "w": (Merge(base["w"], pieces), DType.F32, (ROWS, COLUMNS)),
            "c": (Copy(base["c"]), DType.F32, (50,)),
        }
    )


def benched(
    plan: Plan, folder: Path, timeline: Timeline | None, lanes: Callable[[], Buffers] = Buffers
) -> bytes:
    folder.mkdir()
    listener = Recorder()
    stages(plan, folder, workers=2, lanes=lanes, listener=listener, timeline=timeline)
    return next((folder / "merge").iterdir()).read_bytes()


def count(found: list[Interval], stage: str) -> int:
    return sum(interval.stage == stage for interval in found)


def test_of_threads(tmp_path: Path, plan: Plan) -> None:
    timeline = Timeline()
    assert benched(plan, tmp_path / "timed", timeline) == benched(plan, tmp_path / "not", None)
    found = timeline.intervals()
    assert {interval.stage for interval in found} - {"wait"} == {
        "read",
        "compute",
        "write",
        "copy",
        "hash",
        "sync",
    }
    assert count(found, "read") == BLOCKS
    assert count(found, "write") == BLOCKS + 1  # and the header
    assert count(found, "copy") == count(found, "sync") == 1
    assert count(found, "compute") >= BLOCKS
    assert {i.row.name for i in found if i.stage == "read"} <= {"worker 1", "worker 2"}
    assert {i.row.name for i in found if i.stage == "hash"} == {"hash"}
    check_rows(found)


def test_of_a_device(tmp_path: Path, plan: Plan) -> None:
    timeline = Timeline()

    def lanes() -> Buffers:
        return DeviceBuffers(Queue(), 1000)

    timed = benched(plan, tmp_path / "timed", timeline, lanes)
    assert timed == benched(plan, tmp_path / "not", None, lanes)
    found = timeline.intervals()
    for stage in ("copy up", "compute", "copy back", "read"):
        assert count(found, stage) == BLOCKS, stage
    assert count(found, "write") == BLOCKS + 1  # and the header
    assert count(found, "launch") >= BLOCKS
    queues = {i.row for i in found if i.row.device}
    assert 1 <= len(queues) <= 2
    device = str(Queue().device)
    for row in queues:
        assert row.device == device
        turns = [i.stage for i in found if i.row == row]
        assert turns == ["copy up", "compute", "copy back"] * (len(turns) // 3)
    check_rows(found)

    busy = {activity.stage: activity for activity in timeline.activities()}
    both = busy[f"copies, either way, {device}"]
    assert both.seconds == pytest.approx(busy["copy up"].seconds + busy["copy back"].seconds)
    apart = busy["copy up"].busy + busy["copy back"].busy
    assert 0 < both.busy <= apart * (1 + 1e-9) <= 2  # equal, but for rounding, if none overlap


def check_rows(found: list[Interval]) -> None:
    """Nobody does two things at once."""
    for row in {interval.row for interval in found}:
        own = [interval for interval in found if interval.row == row]
        for one, other in itertools.pairwise(own):
            assert one.begin <= one.end <= other.begin, (one, other)


def at(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    monkeypatch.setattr(module_of_timeline, "perf_counter", iter(times).__next__)


def test_shares_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that read at once are one that reads; a pause is nobody's."""
    timeline = Timeline()
    timeline.add("read", 10, 12)
    timeline.add("read", 11, 14)
    timeline.add("read", 11.5, 12)
    timeline.add("hash", 18, 20)
    at(monkeypatch, 15, 16)
    with timeline.during("read"):
        pass
    queue = Row(-1, "cuda:0, queue 1", "cuda:0")
    timeline.add_late("copy up", queue, lambda: 12.0, lambda: 14.0)
    timeline.add_late("copy back", queue, lambda: 13.0, lambda: 15.0)
    expected = (
        Activity("read", 6.5, 0.5),
        Activity("copy up", 2, 0.2),
        Activity("copy back", 2, 0.2),
        Activity("hash", 2, 0.2),
        Activity("copies, either way, cuda:0", 4, 0.3),
    )
    assert timeline.activities() == timeline.activities() == expected


def test_nothing_happened() -> None:
    assert Timeline().activities() == ()
    assert Timeline().trace()["traceEvents"] == []


def test_what_fails_is_not_counted() -> None:
    timeline = Timeline()

    def fail() -> None:
        with timeline.during("write"):
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        fail()
    assert timeline.intervals() == []


def test_the_trace_is_in_googles_format() -> None:
    """Fields, and microseconds, as the Trace Event Format names them."""
    timeline = Timeline()
    timeline.add("read", 10.5, 10.75)
    queue = Row(-1, "cuda:0, queue 1", "cuda:0")
    timeline.add_late("copy up", queue, lambda: 10.25, lambda: 10.250001)
    own = threading.get_native_id()
    assert timeline.trace() == {
        "traceEvents": [
            {
                "name": "thread_name",
                "ph": "M",
                "pid": 1,
                "tid": -1,
                "args": {"name": "cuda:0, queue 1"},
            },
            {
                "name": "thread_name",
                "ph": "M",
                "pid": 1,
                "tid": own,
                "args": {"name": threading.current_thread().name},
            },
            {
                "name": "copy up",
                "cat": "cuda:0",
                "ph": "X",
                "ts": 0.0,
                "dur": pytest.approx(1),
                "pid": 1,
                "tid": -1,
            },
            {
                "name": "read",
                "cat": "host",
                "ph": "X",
                "ts": pytest.approx(250_000),
                "dur": pytest.approx(250_000),
                "pid": 1,
                "tid": own,
            },
        ],
        "displayTimeUnit": "ms",
    }


def test_blocks_that_shrink() -> None:
    """The worker goes on with the smaller ones."""
    inner = DeviceBuffers(Queue(), 4 << 20)
    timed = TimedBuffers(inner, Timeline())
    assert timed.block_bytes == 4 << 20
    assert timed.shrink()
    assert timed.block_bytes == inner.block_bytes == 2 << 20
