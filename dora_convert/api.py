"""The use cases, one function each: what the commands call, and what a Python user imports."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.core.adapter import Adapter, MagnitudeAxis
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.plan import Copy, Merge, Plan
from dora_convert.core.reports import Figures, Inspection, MergeReport, Verification
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, MismatchError, VerificationError
from dora_convert.formats import detect, formats
from dora_convert.planning.checks import scaled, selected, without
from dora_convert.planning.planner import Proposal, plan_merge
from dora_convert.report.inspection import inspection
from dora_convert.storage.bundle import open_bundle
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.sidefiles import own_files

if TYPE_CHECKING:
    from dora_convert.core.protocols import Listener

__all__ = ["MergeOptions", "ReadOptions", "Silent", "inspect", "merge", "verify"]

# torch is imported by the functions that compute, so that reading headers does without it.


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How adapter and base are read.

    `ignore` are globs of adapter tensors to leave out; `include` and `exclude` globs of module
    paths; `transposed` globs of modules whose weight is stored `[in, out]`; `axis` settles a
    magnitude whose format and shape do not; `scale` multiplies the update (PEFT's set_scale).
    """

    allow_pickle: bool = False
    axis: MagnitudeAxis | None = None
    ignore: Sequence[str] = ()
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    transposed: Sequence[str] = ()
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What a merge writes, and how.

    `dtype`: element type of all plain floats, by default each tensor's own. `max_shard_size`:
    bytes; by default the base's own shards. `workers`: threads, by default one a core.
    `keep_zero_rows`: leave rows of norm 0 at 0 instead of refusing them. `samples`: rows and
    modules that are recomputed afterwards, None for all, 0 for none.
    """

    dtype: DType | None = None
    max_shard_size: int | None = None
    workers: int | None = None
    keep_zero_rows: bool = False
    overwrite: bool = False
    dry_run: bool = False
    samples: int | None = 16


class Silent:
    """A listener that does nothing."""

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""

    def sealed(self, file: str) -> None:
        """See `Listener`."""


def read_adapter(path: Path, options: ReadOptions) -> Adapter:
    """The adapter in canonical layout. Raises InputError."""
    bundle = without(open_bundle(path, allow_pickle=options.allow_pickle), options.ignore)
    adapter = formats.get(detect(bundle)).read(bundle, axis=options.axis)
    return scaled(selected(adapter, options.include, options.exclude), options.scale)


def inspect(
    adapter: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    per_module: bool = False,
    workers: int | None = None,
) -> Inspection:
    """What an adapter is; with a base, whether it fits and how far it moves every module.

    Without a base only headers are read. Raises InputError, and MismatchError if it does not fit.
    """
    options = options or ReadOptions()
    found = read_adapter(adapter, options)
    if base is None:
        return inspection(found, name=str(adapter), per_module=per_module)
    checkpoint = open_checkpoint(base, allow_pickle=options.allow_pickle)
    proposal = plan_merge(found, checkpoint, transposed=options.transposed)
    notes = _checked(proposal, found, adapter, base)

    from dora_convert.execution.measure import figures, module_sums, storage_label

    sums = module_sums(proposal.plan, workers=_workers(workers))
    label = storage_label(proposal.plan)

    def measure(paths: Sequence[str]) -> Figures | None:
        return figures([sums[path] for path in paths if path in sums], label)

    extra = [note for note in (*proposal.plan.notes, *notes) if note not in found.notes]
    return inspection(
        found,
        name=str(adapter),
        base=str(base),
        measure=measure,
        per_module=per_module,
        notes=extra,
    )


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
    base = base or _named_base(found)

    from dora_convert.storage.staging import Staging, check_output

    check_output(output, inputs=(adapter, base), overwrite=how.overwrite)
    checkpoint = open_checkpoint(base, allow_pickle=options.allow_pickle)
    own = own_files(adapter, base) if adapter.is_dir() and base.is_dir() else {}
    proposal = plan_merge(
        found,
        checkpoint,
        dtype=how.dtype,
        max_shard_size=how.max_shard_size,
        transposed=options.transposed,
        overrides=own,
    )
    notes = _checked(proposal, found, adapter, base)
    if own:
        notes.append(f"the adapter's own files are used: {', '.join(sorted(own))}")
    plan = replace(proposal.plan, notes=(*proposal.plan.notes, *notes))
    seconds = {"plan": time.perf_counter() - begun}
    verification = None
    if not how.dry_run:
        from dora_convert.execution.run import run
        from dora_convert.storage.sidefiles import documents_size, write_documents

        extra = documents_size(plan.documents)
        with Staging(output, nbytes=plan.nbytes + extra, overwrite=how.overwrite) as staging:
            times = run(
                plan,
                staging.dir,
                workers=_workers(how.workers),
                listener=listener or Silent(),
                keep_zero_rows=how.keep_zero_rows,
            )
            write_documents(plan.documents, staging.dir)
            seconds |= {"merge": times.merge, "sync": times.sync}
            if how.samples != 0:
                checked = time.perf_counter()
                verification = _verified(
                    plan, staging.dir, samples=how.samples, workers=_workers(how.workers)
                )
                seconds["verify"] = time.perf_counter() - checked
            staging.publish()
    seconds["total"] = time.perf_counter() - begun
    return _report(plan, found, adapter, base, output, seconds, verification)


def verify(
    output: Path,
    *,
    adapter: Path,
    base: Path | None = None,
    options: ReadOptions | None = None,
    samples: int | None = 64,
    tolerance: float = 1.0,
) -> Verification:
    """Recompute a merged checkpoint from its adapter and base, and compare.

    Raises VerificationError, with all that differs.
    """
    options = options or ReadOptions()
    found = read_adapter(adapter, options)
    base = base or _named_base(found)
    checkpoint = open_checkpoint(base, allow_pickle=options.allow_pickle)
    merged = open_checkpoint(output)
    dtype = _changed_dtype(checkpoint, merged)
    proposal = plan_merge(found, checkpoint, dtype=dtype, transposed=options.transposed)
    _checked(proposal, found, adapter, base)

    from dora_convert.execution.verify import verify as recompute

    files = {name: merged.root / shard for name, shard in merged.shards.items()}
    result = recompute(
        proposal.plan, files, samples=samples, tolerance=tolerance, workers=_workers(None)
    )
    known = {job.output.name for job in proposal.plan.jobs}
    extra = [f"{name}: not expected" for name in merged.tensors if name not in known]
    differences = (*result.differences, *extra)
    if differences:
        raise VerificationError(
            "the checkpoint is not what adapter and base give",
            where=(f"output    {output}", f"adapter   {adapter}", f"base      {base}"),
            problems=differences,
        )
    return result


def _checked(proposal: Proposal, adapter: Adapter, name: Path, base: Path) -> list[str]:
    """Look at the data too, then raise for everything at once; returns what is only doubtful."""
    from dora_convert.execution.probe import copy_differences, fingerprint, nonfinite
    from dora_convert.storage.reader import Reader

    reader = Reader()
    cores = _workers(None)
    problems = [*proposal.problems, *nonfinite(adapter, reader, workers=cores)]
    where = (
        f"adapter   {name}   ({adapter.format}, {len(adapter.modules)} modules)",
        f"base      {base}",
    )
    if problems:
        hint = f"The adapter was trained on {adapter.base_model}." if adapter.base_model else ""
        raise MismatchError(
            "the adapter does not fit this base", where=where, problems=problems, hint=hint
        )
    notes = []
    mark = fingerprint(proposal.plan, reader, workers=cores)
    if mark is not None and mark.is_doubtful:
        notes.append(
            "this may not be the base that was trained on: over "
            f"{mark.rows} rows the magnitudes are {mark.deviation:.0%} off its row norms "
            f"(median; correlation {mark.correlation:.2f}), where training moves them by a few %"
        )
    different = copy_differences(adapter.modules.values(), proposal.weights, reader)
    if different:
        notes.append(
            "this may not be the base that was trained on: the adapter carries its own copy of "
            f"{', '.join(different)}, and the base holds other values (the copy is used)"
        )
    return notes


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


def _named_base(adapter: Adapter) -> Path:
    if adapter.base_model is None:
        raise InputError("the adapter does not name its base", hint="Pass it with --base DIR.")
    path = Path(adapter.base_model)
    if not path.exists():
        raise InputError(
            f"the adapter was trained on {adapter.base_model}, which is not a folder here",
            hint="Pass the base model's folder with --base DIR.",
        )
    return path


def _changed_dtype(base: Checkpoint, merged: Checkpoint) -> DType | None:
    """The one type that a merge with `dtype` gave to all plain floats, if it had one."""
    kinds = {
        ref.spec.dtype
        for name, ref in merged.tensors.items()
        if name in base.tensors and base.tensors[name].spec.dtype.is_weight
    }
    own = {base.tensors[n].spec.dtype for n in base.tensors if base.tensors[n].spec.dtype.is_weight}
    return kinds.pop() if len(kinds) == 1 and kinds != own else None


def _workers(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    # Not os.cpu_count(): a container may grant fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report(
    plan: Plan,
    found: Adapter,
    adapter: Path,
    base: Path,
    output: Path,
    seconds: dict[str, float],
    verification: Verification | None,
) -> MergeReport:
    merged = sum(isinstance(job.op, Merge) for job in plan.jobs)
    untouched = sum(
        isinstance(job.op, Copy) and job.output.name not in found.replaced for job in plan.jobs
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
    )
