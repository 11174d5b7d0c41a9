"""A result recomputed before anybody sees it."""

from __future__ import annotations

from pathlib import Path

from dora_convert.core.plan import Plan
from dora_convert.core.reports import Verification
from dora_convert.errors import VerificationError

__all__ = ["verified"]


def verified(plan: Plan, folder: Path, *, samples: int | None, workers: int) -> Verification:
    """What was found the same; raises VerificationError with what was not.

    `samples` rows and modules are looked at, all if None.
    """
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
