"""`verify`: a merged checkpoint, recomputed."""

from __future__ import annotations

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
from dora_convert.storage.checkpoint import open_checkpoint

__all__ = ["verify"]


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
    base = base or named_base(found)
    checkpoint = open_base(base, options)
    found = settled(found, checkpoint, transposed=options.transposed)
    merged = open_checkpoint(output, role="checkpoint")
    dtype = _changed_dtype(checkpoint, merged)
    proposal = plan_merge(
        found, checkpoint, dtype=dtype, transposed=options.transposed, scheme=_scheme(merged)
    )
    checked(proposal, found, adapter, base)

    from dora_convert.execution.verify import verify as recompute

    files = {name: merged.root / shard for name, shard in merged.shards.items()}
    result = recompute(
        proposal.plan, files, samples=samples, tolerance=tolerance, workers=worker_count(None)
    )
    known = {spec.name for shard in proposal.plan.shards for spec in shard.specs}
    extra = [f"{name}: not expected" for name in merged.tensors if name not in known]
    differences = (*result.differences, *extra)
    if differences:
        raise VerificationError(
            "the checkpoint is not what adapter and base give",
            where=(f"output    {output}", f"adapter   {adapter}", f"base      {base}"),
            problems=differences,
        )
    return result


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
