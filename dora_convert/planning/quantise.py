"""Jobs for dense tensors into those that store them in a quantisation scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dora_convert.core.globs import matches_any
from dora_convert.core.plan import Cast, Copy, Job, Merge, PatchRows, Piece, Quantise
from dora_convert.core.protocols import Folding, Quantizer
from dora_convert.core.quantized import QuantizedWeight
from dora_convert.core.tensors import DType, Encoded, Source, TensorRef
from dora_convert.errors import InputError
from dora_convert.planning.families import head_of, input_embedding
from dora_convert.planning.merge import Outputs

__all__ = ["Scheme", "quantised"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """What to store weights in. `keep_dense` are globs of module paths that stay as they are.

    `fold`: whether the scales of a base in the same scheme are kept, times the factor of each row;
    None: where that is best.
    """

    name: str
    quantizer: Quantizer
    keep_dense: tuple[str, ...] = ()
    fold: bool | None = None


def quantised(
    outputs: Outputs, scheme: Scheme, is_transposed: Callable[[str], bool], problems: list[str]
) -> tuple[Outputs, tuple[str, ...]]:
    """The same outputs in the scheme, and the paths of linear modules that stay dense.

    The head is one of these also where it is tied, and so is not in the file. Problems are shapes
    that the scheme cannot hold, and weights that are stored `[in, out]`. Raises InputError if
    nothing is there to quantise, and if scales are to be kept that are not there.
    """
    jobs: dict[str, Job] = {}
    beside = dict(outputs.beside)
    kept = []
    for name, job in outputs.jobs.items():
        path = name.removesuffix(".weight")
        is_taken = scheme.quantizer.takes(job.output) or _are_stored_experts(job, scheme)
        if not is_taken or matches_any(path, scheme.keep_dense):
            jobs[name] = job
            kept += _linear_modules(job)
            continue
        if is_transposed(path):
            problems.append(
                f"{name}: stored as [in, out], and {scheme.quantizer.title} is read as [out, in]: "
                "keep it with --keep-dense"
            )
            continue
        for part in _jobs(job, scheme, problems):
            jobs[part.output.name] = part
            if part.output.name != name:
                beside[part.output.name] = outputs.beside.get(name, name)
    if not problems and all(jobs.get(name) is job for name, job in outputs.jobs.items()):
        raise InputError(
            f"the base has no weight, or none that is not kept dense, for {scheme.quantizer.title}"
        )
    if scheme.fold and not any(isinstance(j.op, Quantise) and j.op.scales for j in jobs.values()):
        raise InputError(
            _why_none_fold(scheme),
            hint="Leave --scales out, and they are made anew where that has to be.",
        )
    heads = [path for path in outputs.jobs if head_of(path.removesuffix(".weight"))]
    return Outputs(jobs, beside), (*dict.fromkeys(kept), *(() if heads else ("lm_head",)))


def _linear_modules(job: Job) -> list[str]:
    """The module that a server would take for quantised, if it is of that kind."""
    path, rank = job.output.name.removesuffix(".weight"), len(job.output.shape)
    if rank == 3 and ".experts." in path:
        return [path.rpartition(".")[0]]
    is_matrix = rank == 2 and path != job.output.name
    return [path] if is_matrix and not input_embedding(path) else []


def _are_stored_experts(job: Job, scheme: Scheme) -> bool:
    """Whether they are the experts of a layer in one tensor, which the base has in the scheme.

    Of others it is not known which axis is which.
    """
    if not isinstance(job.op, Copy | Cast) or len(job.output.shape) != 3:
        return False
    source = job.op.source.source
    return isinstance(source, Encoded) and source.scheme == scheme.name


def _jobs(job: Job, scheme: Scheme, problems: list[str]) -> list[Job]:
    rows = _rows(job)
    if rows is None:
        problems.append(
            f"{job.output.name}: {scheme.quantizer.title} would quantise it, and rows of it were "
            "trained: keep it with --keep-dense"
        )
        return [job]
    base, pieces = rows
    if job.output.dtype is DType.F64:  # no library has scales that are as wide
        job = replace(job, output=replace(job.output, dtype=DType.F32))
    try:
        weight = scheme.quantizer.layout(job.output)
    except InputError as error:
        problems.append(f"{job.output.name}: {error} {error.hint}".strip())
        return [job]
    source = base.source
    if not pieces and isinstance(source, Encoded) and _is_stored_so(source, scheme, weight):
        return [Job(Copy(ref), ref.spec) for ref in (*source.parts.values(), *source.rest)]
    scales = _scales(source, scheme, weight)
    return [replace(job, op=Quantise(base, pieces, scheme.name, weight, scales))]


def _scales(source: Source, scheme: Scheme, weight: QuantizedWeight) -> Mapping[str, TensorRef]:
    """Those of a base in the same scheme, if a row's factor is to go into them."""
    quantizer = scheme.quantizer
    if not isinstance(quantizer, Folding) or not isinstance(source, Encoded):
        return {}
    wanted = quantizer.folds_best if scheme.fold is None else scheme.fold
    if not wanted or not _is_stored_so(source, scheme, weight):
        return {}
    return {role: source.parts[role] for role in quantizer.folds}


def _why_none_fold(scheme: Scheme) -> str:
    if not isinstance(scheme.quantizer, Folding):
        return f"{scheme.quantizer.title} has no scales that the factor of a row could go into"
    return f"the base has no weight of the adapter in {scheme.name}: it has no scales to keep"


def _rows(job: Job) -> tuple[TensorRef, tuple[Piece, ...]] | None:
    match job.op:
        case Merge(base, pieces):
            return base, pieces
        case Copy(source) | Cast(source):
            return source.matrix(), ()
        case PatchRows():
            return None
        case _:
            raise AssertionError(job)  # no scheme takes a bias


def _is_stored_so(source: Encoded, scheme: Scheme, weight: QuantizedWeight) -> bool:
    """Whether the base has it in the same scheme with the same settings: then its bytes stay."""
    stored = {ref.spec for ref in (*source.parts.values(), *source.rest)}
    return (
        source.scheme == scheme.name
        and stored == set(weight.parts.values())
        and dict(source.weight.settings) == dict(weight.settings)
    )
