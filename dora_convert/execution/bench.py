"""How fast each stage of a merge is here: part of a plan, run with more and more of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dora_convert.core.plan import Copy, Job, Merge, Plan, Quantise, Shard
from dora_convert.core.protocols import Listener
from dora_convert.core.reports import Stage
from dora_convert.core.tensors import TensorRef
from dora_convert.execution.decoding import open_reader
from dora_convert.execution.kernels import Output
from dora_convert.execution.lanes import BLOCK_BYTES, Buffers, PerThread
from dora_convert.execution.quantise import do_unit, is_surveyed
from dora_convert.execution.run import run
from dora_convert.execution.sealing import ShardMaker
from dora_convert.execution.surveys import Surveys
from dora_convert.execution.threads import in_threads
from dora_convert.execution.timed import timed_lanes, timed_shards
from dora_convert.execution.timeline import Timeline
from dora_convert.execution.units import Unit, is_two_pass, units
from dora_convert.storage.shards import ShardWriter

__all__ = ["dropped", "sampled", "stages"]


def sampled(plan: Plan, nbytes: int) -> Plan:
    """About `nbytes` of the output as one shard, merged and copied in the plan's proportion.

    What is made otherwise is left out: it is little. One tensor may be larger than its share.
    """
    able = [
        job
        for job in plan.jobs
        if isinstance(job.op, Merge | Quantise | Copy) and job.slices and job.output.shape
    ]
    merged = [job for job in able if not isinstance(job.op, Copy)]
    copied = [job for job in able if isinstance(job.op, Copy)]
    share = nbytes / max(sum(job.nbytes for job in able), 1)
    jobs = (*_fitting(merged, share), *(_fitting(copied, share) if merged else copied[:1]))
    return Plan((Shard("bench.safetensors", jobs),), ())


def stages(
    plan: Plan,
    folder: Path,
    *,
    workers: int,
    lanes: Callable[[], Buffers],
    listener: Listener,
    timeline: Timeline | None = None,
) -> tuple[Stage, ...]:
    """Seconds and bytes of every stage, in files that are made in `folder` and left there.

    Reading is done twice: the first time is the disk's, where the system has not kept the files.
    `timeline` is told of what the merge does.
    """
    copy = _copies(plan)
    found = [Stage("read", _read(copy, workers), copy.nbytes)]
    found.append(Stage("read again", _read(copy, workers), copy.nbytes))
    merged = _merged(plan, workers, lanes)
    if merged is not None:
        found.append(Stage("read and merge", *merged))
    shards: ShardMaker = ShardWriter
    if timeline is not None:
        lanes, shards = timed_lanes(lanes, timeline), timed_shards(timeline)
    copying, merging = (copy, Buffers, ShardWriter), (plan, lanes, shards)
    for name, (part, make, files) in (("copy", copying), ("merge", merging)):
        place = folder / name
        place.mkdir()
        begun = time.perf_counter()
        result = run(part, place, workers=workers, listener=listener, lanes=make, shards=files)
        found.append(Stage(name, result.merge, part.nbytes))
        found.append(Stage(f"{name}, on disk", time.perf_counter() - begun, part.nbytes))
    return tuple(found)


def _fitting(jobs: Sequence[Job], share: float) -> list[Job]:
    """Some of the jobs, in their order, that are this share of their bytes; at least one."""
    left = share * sum(job.nbytes for job in jobs)
    chosen: list[Job] = []
    for job in jobs:
        if job.nbytes <= left or not (chosen or isinstance(job.op, Copy)):
            chosen.append(job)
            left -= job.nbytes
    return chosen


def _copies(plan: Plan) -> Plan:
    """The same reads, each written as it is."""
    jobs: dict[str, Job] = {}
    for job in plan.jobs:
        for ref in job.slices:
            jobs.setdefault(ref.stored.name, Job(Copy(ref), ref.stored))
    return Plan((replace(plan.shards[0], jobs=tuple(jobs.values())),), ())


def _read(plan: Plan, workers: int) -> float:
    """Seconds for reading what the plan copies."""
    reader = open_reader()

    def spans(job: Job) -> Iterator[tuple[TensorRef, int, int]]:
        assert isinstance(job.op, Copy)
        ref, rows = job.op.source, job.op.source.spec.shape[0]
        step = max(1, (64 * BLOCK_BYTES) * rows // max(ref.spec.nbytes, 1))
        yield from ((ref, i, min(i + step, rows)) for i in range(0, rows, step))

    work = [span for job in plan.jobs for span in spans(job)]
    buffers = PerThread(Buffers)

    def read(item: tuple[TensorRef, int, int]) -> None:
        ref, start, stop = item
        with reader.rows(ref) as blocks:
            for a, b in blocks.spans(start, stop, BLOCK_BYTES):
                blocks.read(a, b, buffers.own.take("raw", (b - a) * ref.spec.row_bytes))

    begun = time.perf_counter()
    in_threads(work, read, workers)
    return time.perf_counter() - begun


class _Nowhere:
    """Takes what a kernel writes, and forgets it."""

    def write(self, name: str, offset: int, data: Tensor) -> None:
        """See `ShardWriter`."""

    def overwrite(self, name: str, offset: int, data: Tensor) -> None:
        """See `ShardWriter`."""

    def copy(self, name: str, offset: int, source: int, start: int, *, nbytes: int) -> None:
        """See `ShardWriter`."""


def _merged(plan: Plan, workers: int, lanes: Callable[[], Buffers]) -> tuple[float, int] | None:
    """Seconds and bytes of merging without writing; None where nothing is merged."""
    work = [unit for unit in units(plan) if isinstance(unit.job.op, Merge | Quantise)]
    if not work:
        return None
    dropped(work[:workers], workers, lanes)  # loads what a device needs
    return dropped(work, workers, lanes), sum(unit.nbytes for unit in work)


def dropped(work: Sequence[Unit], workers: int, lanes: Callable[[], Buffers]) -> float:
    """Seconds for units that are read, merged and forgotten."""
    reader, buffers = open_reader(), PerThread(lanes)
    # Of two passes this is the second alone; what the first would have found is no matter.
    factors = {
        unit.job.output.name: torch.ones(unit.job.output.shape[1], dtype=torch.float64)
        for unit in work
        if is_two_pass(unit.job)
    }
    statistics = {unit.job.output.name: torch.ones(1) for unit in work if is_surveyed(unit)}
    surveys = Surveys(work)

    def merge(unit: Unit) -> None:
        buffers.use(
            lambda own: do_unit(unit, Output(reader, own, factors, _Nowhere()), statistics, surveys)
        )

    begun = time.perf_counter()
    in_threads(work, merge, workers)
    return time.perf_counter() - begun
