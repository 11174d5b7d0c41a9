"""`merge`: adapter and base to one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.bases import open_base
from dora_convert.api.reading import (
    ReadOptions,
    adapter_place,
    checked,
    named_base,
    read_adapter,
    worker_count,
)
from dora_convert.api.settling import settled
from dora_convert.core.adapter import Adapter
from dora_convert.core.plan import Copy, Job, Merge, Plan, Quantise
from dora_convert.core.reports import MergeReport, Survival, Verification
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, VerificationError
from dora_convert.planning.planner import plan_merge
from dora_convert.planning.quantise import Scheme
from dora_convert.storage.sidefiles import documents_size, own_files, write_documents
from dora_convert.storage.staging import Staging, check_output

if TYPE_CHECKING:
    from dora_convert.core.protocols import Listener

__all__ = ["MergeOptions", "Silent", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What a merge writes, and how.

    `dtype`: element type of all plain floats, by default each tensor's own. `max_shard_size`:
    bytes; by default the base's own shards. `workers`: threads, by default one a core.
    `keep_zero_rows`: leave rows of norm 0 at 0 instead of refusing them. `samples`: rows and
    modules that are recomputed afterwards, None for all, 0 for none. `quantize`: the scheme of
    `quant` to store weights in, but for the modules that match a glob of `keep_dense`;
    `min_survival`: the share of each module's update that it must keep.
    """

    dtype: DType | None = None
    max_shard_size: int | None = None
    workers: int | None = None
    keep_zero_rows: bool = False
    overwrite: bool = False
    dry_run: bool = False
    samples: int | None = 16
    quantize: str | None = None
    keep_dense: Sequence[str] = ()
    min_survival: float | None = None


class Silent:
    """A listener that does nothing."""

    def started(self, nbytes: int) -> None:
        """See `Listener`."""

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""

    def sealed(self, file: str) -> None:
        """See `Listener`."""


def merge(
    adapter: Path,
    output: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    how: MergeOptions | None = None,
    listener: Listener | None = None,
) -> MergeReport:
    """Merge an adapter into its base; `output` appears complete, or not at all.

    Raises InputError, MismatchError, OutputError, and VerificationError where a recomputation
    disagrees with what was written.
    """
    options, how = options or ReadOptions(), how or MergeOptions()
    begun = time.perf_counter()
    if how.min_survival is not None and (how.quantize is None or how.dry_run):
        raise InputError("min_survival is measured while a quantised result is written")
    place = adapter_place(adapter, options)
    found = read_adapter(place, options)
    base = base or named_base(found)
    check_output(output, inputs=(adapter, base), overwrite=how.overwrite)
    checkpoint = open_base(base, options)
    found = settled(found, checkpoint, transposed=options.transposed)
    # A base that is one file carries nothing along; one on the Hub is a folder in the cache.
    own = own_files(place, checkpoint.root) if place.is_dir() and not base.is_file() else {}
    proposal = plan_merge(
        found,
        checkpoint,
        dtype=how.dtype,
        max_shard_size=how.max_shard_size,
        transposed=options.transposed,
        overrides=own,
        scheme=_scheme(how),
    )
    notes = checked(proposal, found, adapter, base)
    if own:
        notes.append(f"the adapter's own files are used: {', '.join(sorted(own))}")
    if options.trained_on is not None:
        notes.append(
            f"the base's linear layers are taken as {options.trained_on} gives them back, as the "
            "adapter met them in training"
        )
    plan = replace(proposal.plan, notes=(*proposal.plan.notes, *notes))
    seconds = {"plan": time.perf_counter() - begun}
    written = _Written()
    if how.dry_run:
        _check_rows(plan, how)
    else:
        written = _write(plan, output, how, listener or Silent(), seconds)
    seconds["total"] = time.perf_counter() - begun
    return _report(plan, found, adapter, base, output, seconds, written)


@dataclass(frozen=True, slots=True)
class _Written:
    """What was found out about the result."""

    verification: Verification | None = None
    survival: Survival | None = None


def _scheme(how: MergeOptions) -> Scheme | None:
    if how.quantize is None:
        if how.keep_dense:
            raise InputError("keep_dense says what is not quantised: name a scheme as well")
        return None
    from dora_convert import quant

    return Scheme(how.quantize, quant.writable(how.quantize), tuple(how.keep_dense))


def _check_rows(plan: Plan, how: MergeOptions) -> None:
    """What a run would find while it writes: rows whose result is undefined."""
    from dora_convert.execution.faults import raise_faults
    from dora_convert.execution.measure import module_sums

    sums = module_sums(plan, workers=worker_count(how.workers))
    raise_faults(
        {path: part.faults for path, part in sums.items()},
        "the merged weights would not be defined everywhere",
        keep_zero_rows=how.keep_zero_rows,
        hint="--zero-rows keep leaves rows of zeros as they are.",
    )


def _write(
    plan: Plan, output: Path, how: MergeOptions, listener: Listener, seconds: dict[str, float]
) -> _Written:
    """Run the plan beside `output`, check the result, and let it appear."""
    from dora_convert.execution.run import run

    workers = worker_count(how.workers)
    nbytes = plan.nbytes + documents_size(plan.documents)
    verification = None
    with Staging(output, nbytes=nbytes, overwrite=how.overwrite) as staging:
        result = run(
            plan,
            staging.dir,
            workers=workers,
            listener=listener,
            keep_zero_rows=how.keep_zero_rows,
        )
        seconds |= {"merge": result.merge, "sync": result.sync}
        if how.min_survival is not None and result.survival is not None:
            _check_survival(result.survival, how.min_survival)
        write_documents(plan.documents, staging.dir)
        if how.samples != 0:
            begun = time.perf_counter()
            verification = _verified(plan, staging.dir, samples=how.samples, workers=workers)
            seconds["verify"] = time.perf_counter() - begun
        staging.publish()
    return _Written(verification, result.survival)


def _check_survival(survival: Survival, least: float) -> None:
    """Raise VerificationError for modules of whose update too little is left."""
    lost = {path: f.kept for path, f in survival.modules.items() if f.kept < least}
    if lost:
        raise VerificationError(
            f"{survival.scheme} keeps less than {least:.0%} of the update of {len(lost)} of "
            f"{len(survival.modules)} modules; the result was discarded",
            problems=[f"{path}: {kept:.1%} kept" for path, kept in sorted(lost.items())],
            hint="Merge into the 16-bit original of the base, or choose a scheme of more bits.",
        )


def _verified(plan: Plan, folder: Path, *, samples: int | None, workers: int) -> Verification:
    from dora_convert.execution.verify import verify as recompute

    files = {spec.name: folder / shard.file for shard in plan.shards for spec in shard.specs}
    result = recompute(plan, files, samples=samples, workers=workers)
    if result.differences:
        raise VerificationError(
            "the result is not what a recomputation gives; it was discarded",
            problems=result.differences,
            hint="This is a bug, or a fault of disk or memory: please report it.",
        )
    return result


def _is_merged(job: Job) -> bool:
    return isinstance(job.op, Merge) or (isinstance(job.op, Quantise) and bool(job.op.pieces))


def _report(
    plan: Plan,
    found: Adapter,
    adapter: Path,
    base: Path,
    output: Path,
    seconds: dict[str, float],
    written: _Written,
) -> MergeReport:
    merged = sum(_is_merged(job) for job in plan.jobs)
    untouched = sum(
        isinstance(job.op, Copy | Quantise)
        and not _is_merged(job)
        and job.output.name not in found.replaced
        for job in plan.jobs
    )
    files = (*(shard.file for shard in plan.shards), *(doc.name for doc in plan.documents))
    return MergeReport(
        output=str(output),
        adapter=str(adapter),
        base=str(base),
        format=found.format,
        merged=merged,
        replaced=len(plan.jobs) - merged - untouched,
        untouched=untouched,
        shards=len(plan.shards),
        nbytes=plan.nbytes,
        files=tuple(sorted(files)),
        notes=plan.notes,
        seconds=seconds,
        verification=written.verification,
        dry_run="merge" not in seconds,
        survival=written.survival,
    )
