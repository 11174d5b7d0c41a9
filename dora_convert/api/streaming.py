"""A merge that has no more of the model on the disk than the shards that it is at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.cards import merge_figures, write_card
from dora_convert.api.recomputing import verified
from dora_convert.core.plan import CarriedFile, Plan, Shard
from dora_convert.core.reports import Verification
from dora_convert.storage.sidefiles import documents_size, write_documents
from dora_convert.storage.sparse import complete, forget
from dora_convert.storage.staging import Staging
from dora_convert.storage.sums import write_sums

if TYPE_CHECKING:
    from dora_convert.api.uploading import Upload
    from dora_convert.core.protocols import Listener
    from dora_convert.execution.lanes import Buffers

__all__ = ["Streaming", "write_by_shard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How: as the fields of `MergeOptions` of the same names, and where shards go, if not here."""

    workers: int
    lanes: Callable[[], Buffers]
    samples: int | None
    keep_zero_rows: bool
    overwrite: bool
    upload: Upload | None


@dataclass(slots=True)
class _Progress:
    """The parts of a run, told as one."""

    listener: Listener
    sha256: dict[str, str] = field(default_factory=dict)
    checks: list[Verification] = field(default_factory=list)

    def started(self, nbytes: int) -> None:
        """See `Listener`; the whole was told of already."""

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""
        self.listener.advanced(nbytes)

    def sealed(self, file: str) -> None:
        """See `Listener`."""
        self.listener.sealed(file)


def write_by_shard(
    plan: Plan, output: Path, how: Streaming, listener: Listener, seconds: dict[str, float]
) -> Verification | None:
    """Fetch what a shard is made of, check it, merge, check the result, drop what was fetched.

    With an `upload` each shard goes there and is dropped as well, and `output` does not appear: the
    commit that names all shards is the result. Raises HubError, and what a merge raises.
    """
    begun = time.perf_counter()
    progress = _Progress(listener)
    listener.started(plan.nbytes)
    sources = [_sources(shard) for shard in plan.shards]
    forget(set().union(*sources))  # what the checks have read
    most = max((shard.nbytes for shard in plan.shards), default=0)
    nbytes = documents_size(plan.documents) + (most if how.upload is not None else plan.nbytes)
    with Staging(output, nbytes=nbytes, overwrite=how.overwrite) as staging:
        for i, shard in enumerate(plan.shards):
            complete(sources[i])
            _write(replace(plan, shards=(shard,)), staging.dir, how, progress)
            if how.upload is not None:
                how.upload.take(staging.dir / shard.file)
            forget(sources[i].difference(*sources[i + 1 : i + 2]))
        complete({doc.source for doc in plan.documents if isinstance(doc, CarriedFile)})
        write_documents(plan.documents, staging.dir)
        verification = _pooled(progress.checks)
        write_sums(staging.dir, progress.sha256)
        write_card(staging.dir, merge_figures(plan, verification, None, None))
        seconds |= {"merge": time.perf_counter() - begun, "sync": 0.0}
        if how.upload is not None:
            how.upload.finish(staging.dir)
        else:
            staging.publish()
    return verification


def _write(part: Plan, folder: Path, how: Streaming, progress: _Progress) -> None:
    from dora_convert.execution.run import run

    result = run(
        part,
        folder,
        workers=how.workers,
        listener=progress,
        keep_zero_rows=how.keep_zero_rows,
        lanes=how.lanes,
    )
    progress.sha256 |= result.sha256
    if how.samples != 0:
        progress.checks.append(verified(part, folder, samples=how.samples, workers=how.workers))


def _sources(shard: Shard) -> set[Path]:
    """The files that its tensors are made of."""
    return {ref.span[0] for job in shard.jobs for ref in job.slices}


def _pooled(checks: list[Verification]) -> Verification | None:
    """Of all shards together; what rounding does is known of each shard alone."""
    if not checks:
        return None
    return Verification(
        tensors=sum(check.tensors for check in checks),
        modules=sum(check.modules for check in checks),
        rows=sum(check.rows for check in checks),
        compared_bytes=sum(check.compared_bytes for check in checks),
        differences=(),
        rounding=None,
    )
