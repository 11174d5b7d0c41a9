"""A merge that has no more of the model on the disk than the shards that it is at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.cards import merge_figures, write_card
from dora_convert.api.recomputing import verified
from dora_convert.core.plan import CarriedFile, Plan, Quantise, Shard
from dora_convert.core.reports import Survival, Verification
from dora_convert.errors import InputError
from dora_convert.storage.journal import Journal, Sealed
from dora_convert.storage.sidefiles import documents_size, write_documents
from dora_convert.storage.sparse import complete, forget
from dora_convert.storage.staging import Staging
from dora_convert.storage.sums import write_sums

if TYPE_CHECKING:
    from dora_convert.api.uploading import Upload
    from dora_convert.core.protocols import Listener
    from dora_convert.execution.lanes import Buffers

__all__ = ["Streaming", "require_apart", "write_by_shard"]

_COUNTS = ("tensors", "modules", "rows", "compared_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How: as the fields of `MergeOptions` of the same names, and where shards go, if not here.

    `accept` raises where a quantised result keeps too little.
    """

    workers: int
    lanes: Callable[[], Buffers]
    samples: int | None
    accept: Callable[[Survival | None], None]
    keep_zero_rows: bool
    overwrite: bool
    restart: bool
    journal: Journal
    upload: Upload | None


@dataclass(slots=True)
class _Progress:
    """The parts of a run, told as one."""

    listener: Listener
    done: list[Sealed] = field(default_factory=list)

    def started(self, nbytes: int) -> None:
        """See `Listener`; the whole was told of already."""

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""
        self.listener.advanced(nbytes)

    def sealed(self, file: str) -> None:
        """See `Listener`."""
        self.listener.sealed(file)


@dataclass(slots=True)
class _Held:
    """Takes what was found out about a shard, which counts once it was checked, and sent."""

    sealed: dict[str, Sealed] = field(default_factory=dict)

    def add(self, entry: Sealed) -> None:
        """See `Record`."""
        self.sealed[entry.file] = entry


def require_apart(plan: Plan) -> None:
    """Raise InputError for weights that a scheme stores with one scale, but in several shards."""
    from dora_convert import quant

    groups: dict[str, set[str]] = {}
    for shard in plan.shards:
        for job in shard.jobs:
            scheme = quant.writable(job.op.scheme) if isinstance(job.op, Quantise) else None
            if scheme is not None and scheme.surveys:
                group = scheme.fused(job.output.name)
                groups.setdefault(group or job.output.name, set()).add(shard.file)
    problems = [
        f"{g}: in {', '.join(sorted(files))}" for g, files in groups.items() if len(files) > 1
    ]
    if problems:
        raise InputError(
            "low_disk takes a shard at a time, and weights in several of them have one scale",
            problems=problems,
            hint="Choose shards of another --max-shard-size, or merge without --low-disk.",
        )


def write_by_shard(
    plan: Plan, output: Path, how: Streaming, listener: Listener, seconds: dict[str, float]
) -> tuple[Verification | None, Survival | None]:
    """Fetch what a shard is made of, check it, merge, check the result, drop what was fetched.

    With an `upload` each shard goes there and is dropped as well, and `output` does not appear: the
    commit that names all shards is the result. Shards that the journal knows, of a run that was
    interrupted, are neither fetched nor made again. Raises HubError, and what a merge raises.
    """
    begun = time.perf_counter()
    progress = _Progress(listener)
    listener.started(plan.nbytes)
    sources = [_sources(shard) for shard in plan.shards]
    base = merge_figures(plan, None, None, None)["base"] or None
    forget(set().union(*sources))  # what the checks have read
    most = max((shard.nbytes for shard in plan.shards), default=0)
    nbytes = documents_size(plan.documents) + (most if how.upload is not None else plan.nbytes)
    with Staging(
        output,
        nbytes=nbytes,
        overwrite=how.overwrite,
        journal=how.journal,
        restart=how.restart,
    ) as staging:
        for i, shard in enumerate(plan.shards):
            if shard.file in how.journal.kept:
                progress.done.append(how.journal.sealed[shard.file])
                progress.advanced(shard.nbytes)
                if how.upload is not None:
                    how.upload.resume(progress.done[-1], base)
                continue
            complete(sources[i])
            progress.done.append(_write(replace(plan, shards=(shard,)), staging.dir, how, progress))
            if how.upload is None or how.upload.take(shard.file, staging.dir / shard.file, base):
                how.journal.add(progress.done[-1])
            forget(sources[i].difference(*sources[i + 1 : i + 2]))
        complete({doc.source for doc in plan.documents if isinstance(doc, CarriedFile)})
        write_documents(plan.documents, staging.dir)
        verification, survival = _pooled(progress.done), _survival(plan, progress.done)
        how.accept(survival)
        write_card(staging.dir, merge_figures(plan, verification, survival, None))
        write_sums(staging.dir, {shard.file: shard.sha256 for shard in progress.done})
        seconds |= {"merge": time.perf_counter() - begun, "sync": 0.0}
        if how.upload is not None:
            how.upload.finish(staging.dir)
        else:
            staging.publish()
    return verification, survival


def _write(part: Plan, folder: Path, how: Streaming, progress: _Progress) -> Sealed:
    from dora_convert.execution.run import run

    held = _Held()
    run(
        part,
        folder,
        workers=how.workers,
        listener=progress,
        keep_zero_rows=how.keep_zero_rows,
        journal=held,
        lanes=how.lanes,
    )
    (sealed,) = held.sealed.values()
    if how.samples == 0:
        return sealed
    check = verified(part, folder, samples=how.samples, workers=how.workers)
    counts = {name: getattr(check, name) for name in _COUNTS}
    return replace(sealed, found={**sealed.found, "check": counts})


def _sources(shard: Shard) -> set[Path]:
    """The files that its tensors are made of."""
    return {ref.span[0] for job in shard.jobs for ref in job.slices}


def _pooled(shards: list[Sealed]) -> Verification | None:
    """Of all shards together; what rounding does is known of each shard alone."""
    checks = [shard.found["check"] for shard in shards if "check" in shard.found]
    if not checks:
        return None
    sums = {name: sum(check[name] for check in checks) for name in _COUNTS}
    return Verification(**sums, differences=(), rounding=None)


def _survival(plan: Plan, shards: list[Sealed]) -> Survival | None:
    """Of all shards together; None where nothing is quantised."""
    from dora_convert.execution.survival import survival
    from dora_convert.maths.survival import SurvivalSums

    ops = (job.op for job in plan.jobs)
    scheme = next((op.scheme for op in ops if isinstance(op, Quantise)), None)
    if scheme is None:
        return None
    parts = [sums for shard in shards for _, sums in shard.found["survival"]]
    return survival(
        scheme, [{path: SurvivalSums(*n) for path, n in part.items()} for part in parts]
    )
