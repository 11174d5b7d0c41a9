"""Who did what from when to when, as a trace that a browser shows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from dora_convert.core.reports import Activity

__all__ = ["COPY_BACK", "COPY_UP", "Interval", "Row", "Timeline"]

COPY_UP = "copy up"
COPY_BACK = "copy back"
_COPIES = "copies, either way"
# In the order in which a block goes through them.
_STAGES = ("read", COPY_UP, "launch", "compute", "wait", COPY_BACK, "write", "copy", "hash", "sync")
_PROCESS = 1


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the trace: a thread, or a queue of a device, whose numbers are negative."""

    number: int
    name: str
    device: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    """`begin` and `end` are seconds of `time.perf_counter`."""

    stage: str
    row: Row
    begin: float
    end: float


class Timeline:
    """Intervals, added by any thread."""

    def __init__(self) -> None:
        self._intervals: list[Interval] = []
        self._late: list[tuple[str, Row, Callable[[], float], Callable[[], float]]] = []

    def add(self, stage: str, begin: float, end: float) -> None:
        """Something that this thread did."""
        thread = threading.current_thread()
        row = Row(threading.get_native_id(), thread.name)
        self._intervals.append(Interval(stage, row, begin, end))

    def add_late(
        self, stage: str, row: Row, begin: Callable[[], float], end: Callable[[], float]
    ) -> None:
        """Something that a device does; when it began and ended may be asked once all is done."""
        self._late.append((stage, row, begin, end))

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Something that this thread does until the block ends."""
        begin = perf_counter()
        yield
        self.add(stage, begin, perf_counter())

    def intervals(self) -> list[Interval]:
        """All of them, by the time at which they began. Waits for the device."""
        late, self._late = self._late, []
        self._intervals += [Interval(s, row, begin(), end()) for s, row, begin, end in late]
        return sorted(self._intervals, key=lambda interval: interval.begin)

    def activities(self) -> tuple[Activity, ...]:
        """How much of the time each stage went on somewhere, and a device's copies together.

        `copy` is what the kernel copies from file to file.
        """
        found = self.intervals()
        if not found:
            return ()
        whole = max(interval.end for interval in found) - found[0].begin
        groups: dict[str, list[Interval]] = {stage: [] for stage in _STAGES}
        for interval in found:
            groups[interval.stage].append(interval)
            if interval.stage in (COPY_UP, COPY_BACK):
                groups.setdefault(f"{_COPIES}, {interval.row.device}", []).append(interval)
        return tuple(
            Activity(stage, sum(i.end - i.begin for i in group), _covered(group) / whole)
            for stage, group in groups.items()
            if group
        )

    def trace(self) -> dict[str, Any]:
        """What chrome://tracing and https://ui.perfetto.dev open; times are microseconds.

        The format is Google's Trace Event Format, its complete events (`X`) and metadata (`M`):
        https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
        """
        found = self.intervals()
        start = found[0].begin if found else 0.0
        events: list[dict[str, Any]] = [
            {
                "name": "thread_name",
                "ph": "M",
                "pid": _PROCESS,
                "tid": row.number,
                "args": {"name": row.name},
            }
            for row in dict.fromkeys(interval.row for interval in found)
        ]
        events += [
            {
                "name": interval.stage,
                "cat": interval.row.device or "host",
                "ph": "X",
                "ts": round(1e6 * (interval.begin - start), 3),
                "dur": round(1e6 * (interval.end - interval.begin), 3),
                "pid": _PROCESS,
                "tid": interval.row.number,
            }
            for interval in found
        ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def _covered(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one goes on; they are sorted by their begin."""
    total, reached = 0.0, float("-inf")
    for interval in intervals:
        total += max(0.0, interval.end - max(interval.begin, reached))
        reached = max(reached, interval.end)
    return total
