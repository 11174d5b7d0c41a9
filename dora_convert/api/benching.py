"""`bench`: what limits a merge on this machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dora_convert.api.bases import open_base
from dora_convert.api.merging import Silent
from dora_convert.api.reading import ReadOptions, checked, named_base, read_adapter, worker_count
from dora_convert.api.settling import settled
from dora_convert.core.protocols import Listener
from dora_convert.core.reports import BenchReport, Stage
from dora_convert.errors import InputError
from dora_convert.planning.planner import plan_merge
from dora_convert.storage.oserrors import writing

__all__ = ["BenchOptions", "bench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How to measure.

    `sample`: bytes of the result that are made. `folder`: where they are made, and deleted again.
    `workers`, `device`, `max_memory`: as for a merge. `timeline`: a file that is written, or
    replaced, with what every thread and device did during the merge, in Google's Trace Event
    Format: https://ui.perfetto.dev and chrome://tracing open it.
    """

    sample: int = 1 << 30
    folder: Path = Path()
    workers: int | None = None
    device: str = "cpu"
    max_memory: int | None = None
    timeline: Path | None = None


def bench(
    adapter: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    how: BenchOptions | None = None,
    listener: Listener | None = None,
) -> BenchReport:
    """Time reading, merging and writing for a part of a merge, and copying the same bytes.

    Raises InputError, MismatchError and OutputError as `merge` does.
    """
    options, how = options or ReadOptions(), how or BenchOptions()
    if how.timeline is not None:
        with writing(how.timeline):
            how.timeline.parent.stat()
    found = read_adapter(adapter, options)
    base = base or named_base(found)
    checkpoint = open_base(base, options)
    found = settled(found, checkpoint, transposed=options.transposed)
    proposal = plan_merge(found, checkpoint, transposed=options.transposed)
    checked(proposal, found, adapter, base)

    from dora_convert.execution import devices
    from dora_convert.execution.bench import sampled, stages
    from dora_convert.execution.timeline import Timeline

    workers = worker_count(how.workers)
    sample = sampled(proposal.plan, how.sample)
    if not sample.jobs:
        raise InputError(
            "nothing of the base can be measured",
            where=str(base),
            hint="Only safetensors files are: save the base as these.",
        )
    chosen = devices.named(how.device, proposal.plan, workers=workers)
    timeline = None if how.timeline is None else Timeline()
    with (
        writing(how.folder),
        tempfile.TemporaryDirectory(prefix=".dora-convert-", dir=how.folder) as place,
    ):
        measured = stages(
            sample,
            Path(place),
            workers=workers,
            lanes=devices.lanes(chosen, workers=workers, max_memory=how.max_memory),
            listener=listener or Silent(),
            timeline=timeline,
        )
    names = tuple(str(device) for device in chosen)
    report = _report(measured, proposal.plan.nbytes, names, workers)
    if timeline is None or how.timeline is None:
        return report
    with writing(how.timeline):
        how.timeline.write_text(json.dumps(timeline.trace()) + "\n", encoding="utf-8")
    return replace(report, activities=timeline.activities())


def _report(
    measured: Sequence[Stage], nbytes: int, devices: tuple[str, ...], workers: int
) -> BenchReport:
    seconds = {stage.name: stage.seconds for stage in measured}
    rates = {stage.name: stage.nbytes / max(stage.seconds, 1e-9) for stage in measured}
    # What is merged and dropped was read from the page cache.
    disk = min(rates["read"], rates["copy, on disk"])
    slow = rates.get("read and merge", disk) < disk
    return BenchReport(
        stages=tuple(measured),
        of_copy=seconds["merge"] / seconds["copy"],
        limit="arithmetic" if slow else "disk",
        nbytes=nbytes,
        seconds=nbytes / rates["merge, on disk"],
        devices=devices,
        workers=workers,
    )
