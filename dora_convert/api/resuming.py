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
    {"device", "dry_run", "keep_zero_rows", "max_memory", "min_survival", "overwrite", "restart"}
    | {"samples", "workers"}
)


def open_journal(
    plan: Plan,
    how: MergeOptions,
    options: ReadOptions,
    devices: Iterable[torch.device],
    sent_to: str | None = None,
) -> tuple[Journal, Inputs]:
    """The journal of this merge on `devices`, and the files that it reads, as they are now.

    `sent_to` is where its shards go, if they do not stay here.
    """
    import torch

    given = {
        field.name: getattr(group, field.name)
        for group in (how, options)
        for field in fields(group)
        if field.name not in _NO_MATTER
    }
    given["push_to_hub"] = sent_to
    versions = {
        "dora-convert": __version__,
        "torch": str(torch.__version__),
        "device": ", ".join(sorted({device.type for device in devices})),
    }
    mark, inputs = fingerprint(plan, versions=versions, options=given)
    files = [shard.file for shard in plan.shards]
    return Journal(mark, files, inputs, away=sent_to is not None), inputs
