"""`verify`: an output's files hashed, and a merged checkpoint recomputed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dora_convert.api.bases import open_base
from dora_convert.api.reading import ReadOptions, checked, named_base, read_adapter, worker_count
from dora_convert.api.settling import settled
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.reports import Verification
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, VerificationError
from dora_convert.planning.families import quantization
from dora_convert.planning.planner import plan_merge
from dora_convert.planning.quantise import Scheme
from dora_convert.storage.folders import require_path
from dora_convert.storage.pipeline import open_model
from dora_convert.storage.sums import SUMS, changed_files, has_sums

__all__ = ["verify"]


def verify(
    output: Path,
    *,
    adapter: Path | None = None,
    base: Path | None = None,
    options: ReadOptions | None = None,
    samples: int | None = 64,
    tolerance: float = 1.0,
) -> Verification:
    """Compare the files with their hashes, and recompute them from adapter and base.

    Without an adapter the hashes alone are compared, of whatever output; without hashes, as in
    another tool's checkpoint, the recomputation is all. Raises VerificationError, with all that
    differs, InputError where there is neither, and for what cannot be read.
    """
    require_path(output, "output")
    hashed, changed = 0, list[str]()
    if has_sums(output):
        hashed, changed = changed_files(output, workers=worker_count(None))
    if adapter is None:
        return _by_hashes(output, hashed, changed)
    try:
        result = _recomputed(output, adapter, base, options, samples, tolerance)
    except InputError:
        if changed:  # no wonder
            return _by_hashes(output, hashed, changed)
        raise
    differences = (*changed, *result.differences)
    if differences:
        named = "that the adapter names" if base is None else base
        raise VerificationError(
            "the checkpoint is not what adapter and base give",
            where=(f"output    {output}", f"adapter   {adapter}", f"base      {named}"),
            problems=differences,
        )
    return replace(result, hashed=hashed)


def _by_hashes(output: Path, hashed: int, changed: list[str]) -> Verification:
    if changed:
        raise VerificationError(
            "files were changed, or damaged, since they were written",
            where=f"output    {output}",
            problems=changed,
            hint="Write them anew, or copy them from where they are whole.",
        )
    if not hashed:
        what = f"{output.name or output} holds no {SUMS}, the list of its files' hashes"
        hint = "Pass --adapter, and the files are recomputed from it."
        raise InputError(what, where=str(output), hint=hint)
    return Verification(0, 0, 0, 0, (), None, hashed)


def _recomputed(
    output: Path,
    adapter: Path,
    base: Path | None,
    options: ReadOptions | None,
    samples: int | None,
    tolerance: float,
) -> Verification:
    options = options or ReadOptions()
    found = read_adapter(adapter, options)
    base = base or named_base(found)
    checkpoint = open_base(base, options)
    found = settled(found, checkpoint, transposed=options.transposed)
    merged = open_model(output, role="checkpoint")
    dtype = _changed_dtype(checkpoint, merged)
    proposal = plan_merge(
        found, checkpoint, dtype=dtype, transposed=options.transposed, scheme=_scheme(merged)
    )
    notes = checked(proposal, found, adapter, base)

    from dora_convert.execution.verify import verify as recompute

    files = {name: merged.root / shard for name, shard in merged.shards.items()}
    result = recompute(
        proposal.plan, files, samples=samples, tolerance=tolerance, workers=worker_count(None)
    )
    known = {spec.name for shard in proposal.plan.shards for spec in shard.specs}
    extra = [f"{name}: not expected" for name in merged.tensors if name not in known]
    return replace(result, differences=(*result.differences, *extra), notes=tuple(notes))


def _scheme(merged: Checkpoint) -> Scheme | None:
    """What the checkpoint says that it is stored in; what it holds dense was kept so."""
    if quantization(merged.config) is None:
        return None
    from dora_convert import quant

    found = quant.detect(merged.config)
    if len(found) > 1:
        raise InputError(
            f"the checkpoint is stored in several schemes: {', '.join(found)}",
            where=str(merged.root),
            hint="merge --quantize writes one; such a checkpoint cannot be recomputed.",
        )
    (scheme,) = found
    dense = (
        n.removesuffix(".weight") for n, ref in merged.tensors.items() if ref.spec.dtype.is_weight
    )
    return Scheme(scheme, quant.writable(scheme), tuple(dense))


def _changed_dtype(base: Checkpoint, merged: Checkpoint) -> DType | None:
    """The one type that a merge with `dtype` gave to all plain floats, if it had one."""
    kinds = {
        ref.spec.dtype
        for name, ref in merged.tensors.items()
        if name in base.tensors
        and base.tensors[name].spec.dtype.is_weight
        and ref.spec.dtype.is_weight
    }
    own = {base.tensors[n].spec.dtype for n in base.tensors if base.tensors[n].spec.dtype.is_weight}
    return kinds.pop() if len(kinds) == 1 and kinds != own else None
