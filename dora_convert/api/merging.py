"""`merge`: adapter and base to one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.bases import base_name, fetch_merged, open_base
from dora_convert.api.cards import CARD, merge_figures, write_card
from dora_convert.api.correcting import Correction, ResidualOptions, open_correction
from dora_convert.api.reading import (
    ReadOptions,
    adapter_place,
    checked,
    named_base,
    read_adapter,
    worker_count,
)
from dora_convert.api.recomputing import verified
from dora_convert.api.resuming import open_journal
from dora_convert.api.settling import settled
from dora_convert.api.streaming import Streaming, require_apart, write_by_shard
from dora_convert.api.uploading import Offering, Upload
from dora_convert.core.adapter import Adapter
from dora_convert.core.plan import Copy, Job, Merge, Plan, Quantise
from dora_convert.core.reports import MergeReport, Residual, Survival, Verification
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, VerificationError
from dora_convert.hub.ahead import Ahead
from dora_convert.planning.planner import plan_merge
from dora_convert.planning.quantise import Scheme
from dora_convert.storage.origin import identity
from dora_convert.storage.sidefiles import documents_size, own_files, write_documents
from dora_convert.storage.sparse import released
from dora_convert.storage.staging import Staging, check_output
from dora_convert.storage.sums import SUMS, write_sums

if TYPE_CHECKING:
    from dora_convert.core.protocols import Listener

__all__ = ["MergeOptions", "Silent", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What a merge writes, and how.

    `dtype`: element type of all plain floats, by default each tensor's own. `max_shard_size`:
    bytes; by default the base's own shards. `workers`: threads, by default one a core. `device`:
    where the arithmetic is done, as `execution.devices.named` has it; `max_memory`: bytes that
    may be taken there. `keep_zero_rows`: leave rows of norm 0 at 0 instead of refusing them.
    `samples`: rows and modules that are recomputed afterwards, None for all, 0 for none.
    `overwrite`: replace the output; `restart`: give up what an interrupted run of another merge
    into the same folder had finished. `low_disk`: fetch one shard of a base on the Hub at a time,
    and drop it again.

    `quantize`: the scheme of `quant` to store weights in, but for the modules that match a glob of
    `keep_dense`. `min_survival`: the share of each module's update that it must keep. `residual`: a
    LoRA of what it misses, written into the output's folder of that name. `scales`: "fold" keeps
    those of a base in the same scheme, times the factor of each row, "fresh" makes them anew; by
    default whichever leaves less noise.
    """

    dtype: DType | None = None
    max_shard_size: int | None = None
    workers: int | None = None
    device: str = "cpu"
    max_memory: int | None = None
    keep_zero_rows: bool = False
    overwrite: bool = False
    dry_run: bool = False
    samples: int | None = 16
    quantize: str | None = None
    keep_dense: Sequence[str] = ()
    min_survival: float | None = None
    residual: ResidualOptions | None = None
    low_disk: bool = False
    scales: str | None = None
    restart: bool = False


class Silent:
    """A listener that does nothing."""

    def started(self, nbytes: int) -> None:
        """See `Listener`."""

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""

    def sealed(self, file: str) -> None:
        """See `Listener`."""


@released()
def merge(
    adapter: Path,
    output: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    how: MergeOptions | None = None,
    listener: Listener | None = None,
    upload: Upload | Ahead | None = None,
) -> MergeReport:
    """Merge an adapter into its base; `output` appears complete, or not at all.

    With `low_disk` an `upload` takes each shard, and the result is there instead of in `output`.
    Without, an `Ahead` sends each shard as soon as it is on the disk, for `push` to commit.

    Raises InputError, MismatchError, OutputError, and VerificationError where a recomputation
    disagrees with what was written.
    """
    options, how = options or ReadOptions(), how or MergeOptions()
    begun = time.perf_counter()
    _check_options(how, upload)
    place = adapter_place(adapter, options)
    found = read_adapter(place, options)
    base = base or named_base(found)
    check_output(output, inputs=(adapter, base), overwrite=how.overwrite)
    by_shard = how.low_disk and not how.dry_run
    in_part = by_shard or (how.dry_run and how.residual is None)
    checkpoint = open_base(base, options, in_part=in_part)
    found = settled(found, checkpoint, transposed=options.transposed, ahead=not by_shard)
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
    _fetch(proposal.plan, how)
    notes = checked(proposal, found, adapter, base)
    if own:
        notes.append(f"the adapter's own files are used: {', '.join(sorted(own))}")
    correction = None
    if how.residual is not None:
        correction = open_correction(
            found, checkpoint, proposal.plan, how.residual, transposed=options.transposed
        )
        notes += correction.notes
    plan = replace(proposal.plan, notes=(*proposal.plan.notes, *notes))
    seconds = {"plan": time.perf_counter() - begun}
    written = _Written()
    if how.dry_run:
        _check_rows(plan, how)
    elif by_shard:
        stream = _streaming(plan, how, options, upload if isinstance(upload, Upload) else None)
        check, kept = write_by_shard(plan, output, stream, listener or Silent(), seconds)
        written = _Written(check, kept, kept=len(stream.journal.kept))
    else:
        ahead = upload if isinstance(upload, Ahead) else None
        offering = Offering(listener or Silent(), ahead, identity(checkpoint.root))
        written = _write(plan, output, how, offering, seconds, correction, options)
    seconds["total"] = time.perf_counter() - begun
    report = _report(plan, found, adapter, base, output, seconds, written)
    beside = () if correction is None else correction.files
    return replace(report, base=base_name(checkpoint, base), files=(*report.files, *beside))


def _check_options(how: MergeOptions, upload: Upload | Ahead | None) -> None:
    if how.min_survival is not None and (how.quantize is None or how.dry_run):
        raise InputError("min_survival is measured while a quantised result is written")
    if how.residual is not None and how.quantize is None:
        raise InputError("a residual is what a quantised result misses: name a scheme as well")
    if how.low_disk and how.residual is not None:
        raise InputError("a residual is made of the whole base once more: low_disk does without it")
    if upload is not None and (isinstance(upload, Upload) is not how.low_disk or how.dry_run):
        raise InputError("an Upload takes the shards of a merge with low_disk, an Ahead of others")


def _fetch(plan: Plan, how: MergeOptions) -> None:
    """What is to be read of a base on the Hub, but for what comes by shard."""
    if how.low_disk:
        require_apart(plan)
    if how.dry_run or not how.low_disk:
        fetch_merged(plan)


@dataclass(frozen=True, slots=True)
class _Written:
    """What was found out about the result."""

    verification: Verification | None = None
    survival: Survival | None = None
    residual: Residual | None = None
    kept: int = 0


def _scheme(how: MergeOptions) -> Scheme | None:
    if how.quantize is None:
        if how.keep_dense or how.scales:
            raise InputError("keep_dense and scales are about quantising: name a scheme as well")
        return None
    from dora_convert import quant

    if how.scales not in (None, "fold", "fresh"):
        raise InputError(f"scales are fold or fresh, not {how.scales!r}")
    fold = None if how.scales is None else how.scales == "fold"
    return Scheme(how.quantize, quant.writable(how.quantize), tuple(how.keep_dense), fold)


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
    plan: Plan,
    output: Path,
    how: MergeOptions,
    offering: Offering,
    seconds: dict[str, float],
    correction: Correction | None,
    options: ReadOptions,
) -> _Written:
    """Run the plan beside `output`, check the result, and let it appear.

    Shards that an interrupted run of the same merge had finished are taken over.
    """
    from dora_convert.execution import devices
    from dora_convert.execution.run import run

    workers = worker_count(how.workers)
    chosen = devices.named(how.device, plan, workers=workers)
    nbytes = plan.nbytes + documents_size(plan.documents)
    nbytes += 0 if correction is None else correction.nbytes
    verification = residual = None
    journal, inputs = open_journal(plan, how, options, chosen)
    with (
        Staging(
            output, nbytes=nbytes, overwrite=how.overwrite, journal=journal, restart=how.restart
        ) as staging,
        offering.within(staging.dir) as listener,
    ):
        for file in sorted(journal.kept):
            listener.offer(file)
        result = run(
            plan,
            staging.dir,
            workers=workers,
            listener=listener,
            keep_zero_rows=how.keep_zero_rows,
            journal=journal,
            lanes=devices.lanes(chosen, workers=workers, max_memory=how.max_memory),
        )
        seconds |= {"merge": result.merge, "sync": result.sync}
        if correction is None:
            _check_survival(result.survival, how.min_survival)
        write_documents(plan.documents, staging.dir)
        if how.samples != 0:
            begun = time.perf_counter()
            verification = verified(plan, staging.dir, samples=how.samples, workers=workers)
            seconds["verify"] = time.perf_counter() - begun
        if correction is not None:
            begun = time.perf_counter()
            residual = correction.write(staging.dir, workers=workers)
            _check_survival(result.survival, how.min_survival, residual)
            seconds["residual"] = time.perf_counter() - begun
        write_card(staging.dir, merge_figures(plan, verification, result.survival, residual))
        write_sums(staging.dir, result.sha256)
        listener.settle()
        inputs.require_unchanged()
        staging.publish()
    return _Written(verification, result.survival, residual, len(journal.kept))


def _streaming(
    plan: Plan, how: MergeOptions, options: ReadOptions, upload: Upload | None
) -> Streaming:
    from dora_convert.execution import devices

    workers = worker_count(how.workers)
    chosen = devices.named(how.device, plan, workers=workers)
    place = None if upload is None else upload.place
    journal, _ = open_journal(plan, how, options, chosen, place)
    return Streaming(
        workers=workers,
        lanes=devices.lanes(chosen, workers=workers, max_memory=how.max_memory),
        samples=how.samples,
        accept=lambda survival: _check_survival(survival, how.min_survival),
        keep_zero_rows=how.keep_zero_rows,
        overwrite=how.overwrite,
        restart=how.restart,
        journal=journal,
        upload=upload,
    )


def _check_survival(
    survival: Survival | None, least: float | None, residual: Residual | None = None
) -> None:
    """Raise VerificationError for modules of whose update too little is left, LoRA included."""
    if survival is None or least is None:
        return
    kept = {path: figures.kept for path, figures in survival.modules.items()}
    if residual is not None:
        kept |= {path: figures.corrected_kept for path, figures in residual.modules.items()}
    lost = {path: share for path, share in kept.items() if share < least}
    if lost:
        raise VerificationError(
            f"{survival.scheme} keeps less than {least:.0%} of the update of {len(lost)} of "
            f"{len(survival.modules)} modules; the result was discarded",
            problems=[f"{path}: {share:.1%} kept" for path, share in sorted(lost.items())],
            hint="Merge into the 16-bit original of the base, choose a scheme of more bits, or "
            "let a LoRA carry the rest (--residual-rank).",
        )


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
    files = (
        CARD,
        SUMS,
        *(shard.file for shard in plan.shards),
        *(doc.name for doc in plan.documents),
    )
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
        residual=written.residual,
        kept=written.kept,
    )
