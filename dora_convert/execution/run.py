"""A plan to files, on CPU threads. The bytes do not depend on how many there are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dora_convert.core.plan import Merge, PatchRows, Plan, Quantise
from dora_convert.core.protocols import Listener
from dora_convert.core.reports import Survival
from dora_convert.execution.decoding import open_reader
from dora_convert.execution.faults import raise_faults
from dora_convert.execution.findings import Findings
from dora_convert.execution.kernels import Input, Output, sum_columns
from dora_convert.execution.lanes import Buffers, PerThread
from dora_convert.execution.quantise import (
    do_unit,
    gather_statistics,
    is_surveyed,
    survey_unit,
)
from dora_convert.execution.sealing import OpenShards, Sealer, ShardMaker
from dora_convert.execution.surveys import Surveys
from dora_convert.execution.threads import in_threads
from dora_convert.execution.units import Unit, is_two_pass, units
from dora_convert.maths.dora import column_factors
from dora_convert.storage.journal import Sealed
from dora_convert.storage.oserrors import enough_memory
from dora_convert.storage.pagecache import drop, is_larger_than_memory
from dora_convert.storage.reader import Reader
from dora_convert.storage.shards import ShardWriter

__all__ = ["Record", "RunResult", "run"]

# More would leave more unfinished files behind where a run is interrupted.
_ABREAST = 2


class Record(Protocol):
    """What `run` asks of a journal: the shards that are there, by file, and a place for more."""

    @property
    def sealed(self) -> Mapping[str, Sealed]:
        """Those that need not be written."""
        ...

    def add(self, entry: Sealed) -> None:
        """A shard is on the disk."""
        ...


@dataclass(frozen=True, slots=True)
class RunResult:
    """Seconds until all bytes were handed to the system, and until they were on the disk.

    `survival`: what a quantised result keeps of the updates. `sha256`: of every shard, by file.
    """

    merge: float
    sync: float
    survival: Survival | None
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Run:
    """What all passes share. `kept`: the shards that are there already, by index."""

    plan: Plan
    folder: Path
    workers: int
    listener: Listener
    work: Sequence[Unit]
    findings: Findings
    journal: Record | None
    kept: Mapping[int, Sealed]
    lanes: Callable[[], Buffers]
    shards: ShardMaker
    reader: Reader = field(default_factory=open_reader)
    sha256: dict[str, str] = field(default_factory=dict)

    def sealed(self, index: int, writer: ShardWriter, sha256: str) -> None:
        """A shard is on the disk."""
        name = self.plan.shards[index].file
        if self.journal is not None:
            found = self.findings.of_shard(index)
            self.journal.add(Sealed(name, writer.nbytes, sha256, found))
        self.sha256[name] = sha256
        self.listener.sealed(name)
        if is_larger_than_memory(self.plan.nbytes):
            read = (ref for job in self.plan.shards[index].jobs for ref in job.slices)
            drop([(writer.file, 0, writer.nbytes), *(ref.span for ref in read)])


def run(  # noqa: PLR0913 - the last is for who measures
    plan: Plan,
    folder: Path,
    *,
    workers: int,
    listener: Listener,
    keep_zero_rows: bool = False,
    journal: Record | None = None,
    lanes: Callable[[], Buffers] = Buffers,
    shards: ShardMaker = ShardWriter,
) -> RunResult:
    """Write every shard of the plan into `folder`, each fsynced as soon as it is complete.

    Shards that `journal` knows are left as they are, and it is told of the others. `lanes` makes
    the buffers of each worker, and with them says on which device it computes; `shards` opens the
    files. Raises MismatchError, once all is seen, for rows whose result is undefined;
    `keep_zero_rows` leaves rows of norm 0 at zero instead. OutputError where disk or memory do not
    suffice.
    """
    begun = time.perf_counter()
    work = list(units(plan))
    known = {} if journal is None else journal.sealed
    kept = {i: known[shard.file] for i, shard in enumerate(plan.shards) if shard.file in known}
    this = _Run(plan, folder, workers, listener, work, Findings(work), journal, kept, lanes, shards)
    _begin(this)
    with enough_memory():
        two_pass, surveyed = _first_passes(this)
        factors = _measure(this, two_pass)
        statistics = _survey(this, surveyed, factors)
        merged = _write(this, factors, statistics)
    raise_faults(
        this.findings.faults,
        "the merged weights are not defined everywhere; nothing was written",
        keep_zero_rows=keep_zero_rows,
        hint="--zero-rows keep leaves rows of zeros as they are.",
    )
    return RunResult(
        merge=merged - begun,
        sync=time.perf_counter() - merged,
        survival=this.findings.survival(),
        sha256=this.sha256,
    )


def _begin(this: _Run) -> None:
    this.listener.started(this.plan.nbytes)
    for index, sealed in this.kept.items():
        this.findings.restore(index, sealed.found)
        this.sha256[sealed.file] = sealed.sha256
        this.listener.advanced(this.plan.shards[index].nbytes)


def _left(this: _Run) -> list[tuple[int, Unit]]:
    """Units of shards that are still to be written, with their index in the plan."""
    return [(i, unit) for i, unit in enumerate(this.work) if unit.shard not in this.kept]


def _first_passes(this: _Run) -> tuple[list[Unit], list[Unit]]:
    """Units whose norms run over the rows, and units whose scheme needs a number of the whole.

    Tensors that share such a number may lie in several shards, some of which are there already.
    """
    needed = {index for index, _ in _left(this)}
    surveyed = {index for index, unit in enumerate(this.work) if is_surveyed(unit)}
    if not surveyed & needed:
        surveyed = set()
    both = sorted(needed | surveyed)
    two_pass = [this.work[index] for index in both if is_two_pass(this.work[index].job)]
    return two_pass, [this.work[index] for index in sorted(surveyed)]


def _measure(this: _Run, work: Sequence[Unit]) -> dict[str, Tensor]:
    """First pass of IN jobs: the factor of every column, by output tensor."""
    sums: dict[int, Tensor] = {}
    buffers = PerThread(this.lanes)

    def measure(item: tuple[int, Unit]) -> None:
        i, unit = item
        sums[i] = buffers.use(lambda own: sum_columns(unit, this.reader, own))

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
        this.findings.add_faults(name, fault)
    return factors


def _survey(this: _Run, work: Sequence[Unit], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """First pass of schemes that need a number of the whole tensor: that number, by name."""
    surveys: dict[int, list[Tensor]] = {}
    buffers = PerThread(this.lanes)

    def survey(item: tuple[int, Unit]) -> None:
        i, unit = item
        surveys[i] = buffers.use(lambda own: survey_unit(unit, Input(this.reader, own, factors)))

    in_threads(list(enumerate(work)), survey, this.workers)
    return gather_statistics(work, surveys)


def _abreast(work: Sequence[tuple[int, Unit]], files: int) -> list[tuple[int, Unit]]:
    """The same units, so that so many files grow at a time, each from its front on.

    A file is hashed by one thread, which is all that a fast disk would wait for.
    """
    by_shard: dict[int, deque[tuple[int, Unit]]] = {}
    for item in work:
        by_shard.setdefault(item[1].shard, deque()).append(item)
    waiting = iter(by_shard.values())
    growing = list(islice(waiting, files))
    ordered = []
    while growing:
        for place, units_left in enumerate(growing):
            ordered.append(units_left.popleft())
            if not units_left:
                growing[place] = next(waiting, units_left)
        growing = [units_left for units_left in growing if units_left]
    return ordered


def _is_final(unit: Unit, device: torch.device) -> bool:
    """Whether no byte is written again that would have to be another one then.

    On a device a unit may be repeated, where codes have to be those of the scales beside them.
    """
    if isinstance(unit.job.op, Quantise):
        return device.type == "cpu"
    return not isinstance(unit.job.op, PatchRows)


def _write(this: _Run, factors: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> float:
    """All units; returns the time at which the last byte was handed to the system."""
    work = _left(this)
    shards = OpenShards(this.plan, [unit for _, unit in work], this.folder, this.shards)
    sealer = Sealer(this.sealed)
    surveys = Surveys(unit for _, unit in work)
    buffers = PerThread(this.lanes)

    def write(item: tuple[int, Unit]) -> None:
        index, unit = item
        name = unit.job.output.name
        final = _is_final(unit, buffers.own.device)
        with enough_memory(name), shards.writer(unit.shard).part(final=final) as part:
            found, sums = buffers.use(
                lambda own: do_unit(
                    unit, Output(this.reader, own, factors, part), statistics, surveys
                )
            )
        this.findings.add_faults(name, found)
        if sums:
            this.findings.add_sums(index, sums)
        this.listener.advanced(unit.nbytes)
        complete = shards.done(unit.shard)
        if complete is not None:
            complete.flush()
            sealer.put(unit.shard, complete)

    try:
        in_threads(_abreast(work, min(this.workers, _ABREAST)), write, this.workers)
        for index, writer in shards.empty(skip=this.kept):
            sealer.put(index, writer)
        merged = time.perf_counter()
    except BaseException:
        sealer.abandon()
        raise
    finally:
        shards.close()
    sealer.finish()
    return merged
