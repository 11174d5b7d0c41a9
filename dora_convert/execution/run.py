"""A plan to files, on CPU threads. The bytes do not depend on how many there are."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dora_convert.core.plan import Merge, Plan, Quantise
from dora_convert.core.protocols import Listener
from dora_convert.core.reports import Survival
from dora_convert.execution.decoding import open_reader
from dora_convert.execution.faults import raise_faults
from dora_convert.execution.kernels import Input, Output, run_unit, sum_columns
from dora_convert.execution.lanes import Buffers
from dora_convert.execution.quantise import (
    gather_statistics,
    is_surveyed,
    quantise_unit,
    survey_unit,
)
from dora_convert.execution.survival import survival
from dora_convert.execution.threads import in_threads
from dora_convert.execution.units import Unit, is_two_pass, units
from dora_convert.maths.dora import RowFaults, column_factors
from dora_convert.maths.survival import SurvivalSums
from dora_convert.storage.reader import Reader
from dora_convert.storage.shards import ShardWriter

__all__ = ["RunResult", "run"]


@dataclass(frozen=True, slots=True)
class RunResult:
    """Seconds until all bytes were handed to the system, and until they were on the disk.

    `survival`: what a quantised result keeps of the updates.
    """

    merge: float
    sync: float
    survival: Survival | None


@dataclass(slots=True)
class _Faults:
    """What went wrong in which tensor; several threads add to it."""

    found: dict[str, RowFaults] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, faults: RowFaults) -> None:
        if faults:
            with self.lock:
                self.found[name] = self.found.get(name, RowFaults()) + faults.settled()


@dataclass(frozen=True, slots=True)
class _Run:
    """What both passes share."""

    plan: Plan
    folder: Path
    workers: int
    listener: Listener
    reader: Reader = field(default_factory=open_reader)
    faults: _Faults = field(default_factory=_Faults)


def run(
    plan: Plan,
    folder: Path,
    *,
    workers: int,
    listener: Listener,
    keep_zero_rows: bool = False,
) -> RunResult:
    """Write every shard of the plan into `folder`, each fsynced as soon as it is complete.

    Raises MismatchError, once all is seen, for rows whose result is undefined; `keep_zero_rows`
    leaves rows of norm 0 at zero instead.
    """
    begun = time.perf_counter()
    this = _Run(plan, folder, workers, listener)
    work = list(units(plan))
    listener.started(plan.nbytes)
    factors = _measure(this, [unit for unit in work if is_two_pass(unit.job)])
    statistics = _survey(this, [unit for unit in work if is_surveyed(unit)], factors)
    merged, measured = _write(this, work, factors, statistics)
    raise_faults(
        this.faults.found,
        "the merged weights are not defined everywhere; nothing was written",
        keep_zero_rows=keep_zero_rows,
        hint="--zero-rows keep leaves rows of zeros as they are.",
    )
    scheme = next((u.job.op.scheme for u in work if isinstance(u.job.op, Quantise)), "")
    return RunResult(
        merge=merged - begun,
        sync=time.perf_counter() - merged,
        survival=survival(scheme, measured),
    )


def _measure(this: _Run, work: Sequence[Unit]) -> dict[str, Tensor]:
    """First pass of IN jobs: the factor of every column, by output tensor."""
    sums: dict[int, Tensor] = {}
    buffers = _PerThread()

    def measure(item: tuple[int, Unit]) -> None:
        sums[item[0]] = sum_columns(item[1], this.reader, buffers.own)

    in_threads(list(enumerate(work)), measure, this.workers)
    totals: dict[str, Tensor] = {}
    # Added in the order of the units, whoever computed them: float addition is not associative.
    for i, unit in enumerate(work):
        name = unit.job.output.name
        totals[name] = totals[name] + sums[i] if name in totals else sums[i]
    factors = {}
    for name, squares in totals.items():
        op = next(u.job.op for u in work if u.job.output.name == name)
        assert isinstance(op, Merge | Quantise)
        magnitude = op.pieces[0].module.magnitude
        assert magnitude is not None
        factors[name], fault = column_factors(this.reader.load(magnitude), squares)
        this.faults.add(name, fault)
    return factors


def _survey(this: _Run, work: Sequence[Unit], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """First pass of schemes that need a number of the whole tensor: that number, by name."""
    surveys: dict[int, list[Tensor]] = {}
    buffers = _PerThread()

    def survey(item: tuple[int, Unit]) -> None:
        given = Input(this.reader, buffers.own, factors)
        surveys[item[0]] = survey_unit(item[1], given)

    in_threads(list(enumerate(work)), survey, this.workers)
    return gather_statistics(work, surveys)


class _PerThread(threading.local):
    """One set of buffers for each thread that asks."""

    def __init__(self) -> None:
        self.own = Buffers()


class _Shards:
    """Files that are open, and how many units each still waits for."""

    def __init__(self, plan: Plan, work: Iterable[Unit], folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._waiting = Counter(unit.shard for unit in work)
        self._open: dict[int, ShardWriter] = {}
        self._lock = threading.Lock()

    def writer(self, index: int) -> ShardWriter:
        with self._lock:
            if index not in self._open:
                shard = self._plan.shards[index]
                self._open[index] = ShardWriter(self._folder / shard.file, shard.specs)
            return self._open[index]

    def done(self, index: int) -> ShardWriter | None:
        """One unit less; the file, once it was the last."""
        with self._lock:
            self._waiting[index] -= 1
            return self._open.pop(index) if self._waiting[index] == 0 else None

    def close(self) -> None:
        for writer in self._open.values():
            writer.close()

    def empty(self) -> list[ShardWriter]:
        """Files without any byte of data, which no unit opens."""
        missing = [shard for i, shard in enumerate(self._plan.shards) if i not in self._waiting]
        return [ShardWriter(self._folder / shard.file, shard.specs) for shard in missing]


def _write(
    this: _Run,
    work: Sequence[Unit],
    factors: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
) -> tuple[float, list[dict[str, SurvivalSums]]]:
    """All units; returns the time at which the last byte was handed to the system.

    And, in the order of the units, what those that are quantised keep of the updates.
    """
    shards = _Shards(this.plan, work, this.folder)
    sealer = _Sealer(this.listener)
    buffers = _PerThread()
    measured: dict[int, dict[str, SurvivalSums]] = {}

    def write(item: tuple[int, Unit]) -> None:
        index, unit = item
        output = Output(this.reader, buffers.own, factors, shards.writer(unit.shard))
        if isinstance(unit.job.op, Quantise):
            found, measured[index] = quantise_unit(unit, output, statistics)
        else:
            found = run_unit(unit, output)
        this.faults.add(unit.job.output.name, found)
        this.listener.advanced(unit.nbytes)
        complete = shards.done(unit.shard)
        if complete is not None:
            sealer.put(complete)

    try:
        in_threads(list(enumerate(work)), write, this.workers)
        for writer in shards.empty():
            sealer.put(writer)
        merged = time.perf_counter()
    except BaseException:
        sealer.abandon()
        raise
    finally:
        shards.close()
    sealer.finish()
    return merged, [measured[index] for index in sorted(measured)]


class _Sealer:
    """Waits for the disk in a thread of its own, so that workers need not."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._queue: queue.SimpleQueue[ShardWriter | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._seal, name="sealer", daemon=True)
        self._thread.start()

    def put(self, writer: ShardWriter) -> None:
        self._queue.put(writer)

    def finish(self) -> None:
        """Wait for all; raises what went wrong."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """The run failed: wait for the file in hand only."""
        self._error = self._error or InterruptedError()
        self._queue.put(None)
        self._thread.join()

    def _seal(self) -> None:
        while (writer := self._queue.get()) is not None:
            try:
                if self._error is None:
                    writer.seal()
                    self._listener.sealed(writer.file.name)
            except BaseException as error:
                self._error = error
            finally:
                writer.close()
