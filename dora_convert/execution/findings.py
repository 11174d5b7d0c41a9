"""What is found out while shards are written, shard by shard, so that a later run can have it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from dora_convert.core.plan import Quantise
from dora_convert.core.reports import Survival
from dora_convert.execution.survival import survival
from dora_convert.execution.units import Unit
from dora_convert.maths.dora import RowFaults
from dora_convert.maths.survival import SurvivalSums

__all__ = ["Findings"]


class Findings:
    """Results that are undefined, and what a quantised result keeps; several threads add to it.

    `work` are all units of the plan, in their order.
    """

    def __init__(self, work: Sequence[Unit]) -> None:
        self.faults: dict[str, RowFaults] = {}
        self._work = work
        self._sums: dict[int, dict[str, SurvivalSums]] = {}
        self._restored: set[str] = set()
        self._lock = threading.Lock()

    def add_faults(self, name: str, faults: RowFaults) -> None:
        """Of one tensor; those of tensors that an earlier run wrote are known already."""
        if faults and name not in self._restored:
            with self._lock:
                self.faults[name] = self.faults.get(name, RowFaults()) + faults.settled()

    def add_sums(self, index: int, sums: dict[str, SurvivalSums]) -> None:
        """What the unit of this index keeps of every module's update."""
        with self._lock:
            self._sums[index] = sums

    def of_shard(self, shard: int) -> dict[str, Any]:
        """All of a shard whose units are done, as JSON has it; numbers come back the same."""
        units = [i for i, unit in enumerate(self._work) if unit.shard == shard]
        names = {self._work[i].job.output.name for i in units}
        with self._lock:
            return {
                "faults": {n: astuple(f) for n, f in sorted(self.faults.items()) if n in names},
                "survival": [
                    [i, {path: astuple(sums) for path, sums in self._sums[i].items()}]
                    for i in units
                    if i in self._sums
                ],
            }

    def restore(self, shard: int, found: Mapping[str, Any]) -> None:
        """Take over what `of_shard` gave in an earlier run."""
        self._restored |= {unit.job.output.name for unit in self._work if unit.shard == shard}
        for name, counts in found["faults"].items():
            self.faults[name] = RowFaults(*counts)
        for index, sums in found["survival"]:
            self._sums[index] = {path: SurvivalSums(*numbers) for path, numbers in sums.items()}

    def survival(self) -> Survival | None:
        """The figures of all modules; None where nothing is quantised."""
        ops = (unit.job.op for unit in self._work)
        scheme = next((op.scheme for op in ops if isinstance(op, Quantise)), "")
        # In the order of the units: float addition is not associative.
        return survival(scheme, [self._sums[index] for index in sorted(self._sums)])
