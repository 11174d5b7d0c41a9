"""`inspect`: what an adapter is and does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dora_convert.api.bases import base_name, fetch_merged, open_base
from dora_convert.api.reading import ReadOptions, checked, read_adapter, worker_count
from dora_convert.api.settling import settled
from dora_convert.core.reports import Figures, Inspection
from dora_convert.planning.planner import plan_merge
from dora_convert.planning.settle import open_questions
from dora_convert.report.inspection import inspection
from dora_convert.storage.sparse import released

__all__ = ["inspect"]


@released()
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
        notes = open_questions(found)
        return inspection(found, name=str(adapter), per_module=per_module, notes=notes)
    checkpoint = open_base(base, options, in_part=True)
    found = settled(found, checkpoint, transposed=options.transposed)
    proposal = plan_merge(found, checkpoint, transposed=options.transposed)
    fetch_merged(proposal.plan)
    notes = checked(proposal, found, adapter, base)

    from dora_convert.execution.measure import figures, module_sums, storage_label

    sums = module_sums(proposal.plan, workers=worker_count(workers))
    label = storage_label(proposal.plan)

    def measure(paths: Sequence[str]) -> Figures | None:
        return figures([sums[path] for path in paths if path in sums], label)

    undefined = {
        path: int(part.faults.zero + part.faults.nonfinite)
        for path, part in sums.items()
        if part.faults
    }
    if undefined:
        first = next(iter(undefined))
        notes.append(
            f"{sum(undefined.values())} rows of {len(undefined)} modules ({first}, ...) are zero, "
            "NaN or infinite where they have a magnitude: merge will refuse them"
        )
    extra = [note for note in (*proposal.plan.notes, *notes) if note not in found.notes]
    return inspection(
        found,
        name=str(adapter),
        base=base_name(checkpoint, base),
        measure=measure,
        per_module=per_module,
        notes=extra,
    )
