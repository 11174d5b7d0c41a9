"""What a merge has to have in common with an earlier one to go on where that one stopped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from dora_convert import __version__
from dora_convert.api.reading import ReadOptions
from dora_convert.core.plan import Plan
from dora_convert.storage.fingerprint import Inputs, fingerprint
from dora_convert.storage.journal import Journal

if TYPE_CHECKING:
    import torch

    from dora_convert.api.merging import MergeOptions

__all__ = ["open_journal"]

# They decide whether, where and how fast, not what.
_NO_MATTER = frozenset(
    {"device", "dry_run", "keep_zero_rows", "low_disk", "max_memory", "min_survival", "overwrite"}
    | {"restart", "samples", "workers"}
)


def open_journal(
    plan: Plan, how: MergeOptions, options: ReadOptions, devices: Iterable[torch.device]
) -> tuple[Journal, Inputs]:
    """The journal of this merge on `devices`, and the files that it reads, as they are now."""
    import torch

    given = {
        field.name: getattr(group, field.name)
        for group in (how, options)
        for field in fields(group)
        if field.name not in _NO_MATTER
    }
    versions = {
        "dora-convert": __version__,
        "torch": str(torch.__version__),
        "device": ", ".join(sorted({device.type for device in devices})),
    }
    mark, inputs = fingerprint(plan, versions=versions, options=given)
    return Journal(mark, [shard.file for shard in plan.shards], inputs), inputs
