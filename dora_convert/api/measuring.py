"""What `inspect` and `plot` have in common: an adapter on its base, and sums over its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.bases import base_name, fetch_merged, open_base
from dora_convert.api.reading import ReadOptions, checked, worker_count
from dora_convert.api.settling import settled
from dora_convert.core.adapter import Adapter
from dora_convert.core.plan import Plan
from dora_convert.core.reports import Figures
from dora_convert.planning.planner import plan_merge

if TYPE_CHECKING:
    from dora_convert.maths.compare import ModuleSums

__all__ = ["Match", "Measures", "matched", "measured"]


@dataclass(frozen=True, slots=True)
class Match:
    """An adapter that fits its base. `notes`: what is doubtful; the plan has its own."""

    adapter: Adapter
    base: str  # as reports call it
    plan: Plan
    notes: list[str]


def matched(adapter: Adapter, name: Path, base: Path, options: ReadOptions) -> Match:
    """The adapter as the base has it. Raises InputError, HubError and MismatchError."""
    checkpoint = open_base(base, options, in_part=True)
    adapter = settled(adapter, checkpoint, transposed=options.transposed)
    proposal = plan_merge(adapter, checkpoint, transposed=options.transposed)
    fetch_merged(proposal.plan)
    notes = checked(proposal, adapter, name, base)
    return Match(adapter, base_name(checkpoint, base), proposal.plan, notes)


@dataclass(frozen=True, slots=True)
class Measures:
    """Sums by module path. `stored_as` is the type that rounding is measured for."""

    sums: Mapping[str, ModuleSums]
    stored_as: str

    def figures(self, paths: Sequence[str]) -> Figures:
        """Those of some modules together."""
        from dora_convert.execution.measure import figures

        return figures([self.sums[path] for path in paths if path in self.sums], self.stored_as)

    @property
    def notes(self) -> list[str]:
        """What `merge` will say of it."""
        undefined = {path: sums.faults for path, sums in self.sums.items() if sums.faults}
        if not undefined:
            return []
        rows = sum(int(faults.zero + faults.nonfinite) for faults in undefined.values())
        return [
            f"{rows} rows of {len(undefined)} modules ({next(iter(undefined))}, ...) are zero, "
            "NaN or infinite where they have a magnitude: merge will refuse them"
        ]


def measured(plan: Plan, workers: int | None) -> Measures:
    """Go through every module's weight."""
    from dora_convert.execution.measure import module_sums, storage_label

    return Measures(module_sums(plan, workers=worker_count(workers)), storage_label(plan))
