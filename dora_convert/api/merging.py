"""`merge`: adapter and base to one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.bases import open_base
from dora_convert.api.reading import ReadOptions, checked, named_base, read_adapter, worker_count
from dora_convert.api.settling import settled
from dora_convert.core.adapter import Adapter
from dora_convert.core.plan import Copy, Job, Merge, Plan, Quantise
from dora_convert.core.reports import MergeReport, Verification
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
    `quant` to store weights in, but for the modules that match a glob of `keep_dense`.
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
    found = read_adapter(adapter, options)
    base = base or named_base(found)
    check_output(output, inputs=(adapter, base), overwrite=how.overwrite)
    checkpoint = open_base(base, options)
    found = settled(found, checkpoint, transposed=options.transposed)
    own = own_files(adapter, base) if adapter.is_dir() and base.is_dir() else {}
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
    plan = replace(proposal.plan, notes=(*proposal.plan.notes, *notes))
    seconds = {"plan": time.perf_counter() - begun}
    verification = None
    if how.dry_run:
        _check_rows(plan, how)
    else:
        verification = _write(plan, output, how, listener or Silent(), seconds)
    seconds["total"] = time.perf_counter() - begun
    return _report(plan, found, adapter, base, output, seconds, verification)


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
) -> Verification | None:
    """Run the plan beside `output`, check the result, and let it appear."""
    from dora_convert.execution.run import run

    workers = worker_count(how.workers)
    nbytes = plan.nbytes + documents_size(plan.documents)
    verification = None
    with Staging(output, nbytes=nbytes, overwrite=how.overwrite) as staging:
        times = run(
            plan,
            staging.dir,
            workers=workers,
            listener=listener,
            keep_zero_rows=how.keep_zero_rows,
        )
        write_documents(plan.documents, staging.dir)
        seconds |= {"merge": times.merge, "sync": times.sync}
        if how.samples != 0:
            begun = time.perf_counter()
            verification = _verified(plan, staging.dir, samples=how.samples, workers=workers)
            seconds["verify"] = time.perf_counter() - begun
        staging.publish()
    return verification


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
    verification: Verification | None,
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
        verification=verification,
        dry_run="merge" not in seconds,
    )
