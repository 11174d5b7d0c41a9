"""Jobs for dense tensors into those that store them in a quantisation scheme."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dora_convert.core.globs import matches_any
from dora_convert.core.plan import Cast, Copy, Job, Merge, PatchRows, Piece, Quantise
from dora_convert.core.protocols import Quantizer
from dora_convert.core.quantized import QuantizedWeight
from dora_convert.core.tensors import Encoded, TensorRef
from dora_convert.errors import InputError
from dora_convert.planning.families import head_of, input_embedding
from dora_convert.planning.merge import Outputs

__all__ = ["Scheme", "quantised"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """What to store weights in. `keep_dense` are globs of module paths that stay as they are."""

    name: str
    quantizer: Quantizer
    keep_dense: tuple[str, ...] = ()


def quantised(
    outputs: Outputs, scheme: Scheme, problems: list[str]
) -> tuple[Outputs, tuple[str, ...]]:
    """The same outputs in the scheme, and the paths of linear modules that stay dense.

    The head is one of these also where it is tied, and so is not in the file. Shapes that the
    scheme cannot hold are problems.
    """
    jobs: dict[str, Job] = {}
    beside = dict(outputs.beside)
    kept = []
    for name, job in outputs.jobs.items():
        path = name.removesuffix(".weight")
        if not scheme.quantizer.takes(job.output) or matches_any(path, scheme.keep_dense):
            jobs[name] = job
            is_matrix = name.endswith(".weight") and len(job.output.shape) == 2
            if is_matrix and not input_embedding(path):
                kept.append(path)
            continue
        for part in _jobs(job, scheme, problems):
            jobs[part.output.name] = part
            if part.output.name != name:
                beside[part.output.name] = outputs.beside.get(name, name)
    heads = [path for path in outputs.jobs if head_of(path.removesuffix(".weight"))]
    return Outputs(jobs, beside), (*kept, *(() if heads else ("lm_head",)))


def _jobs(job: Job, scheme: Scheme, problems: list[str]) -> list[Job]:
    rows = _rows(job)
    if rows is None:
        problems.append(
            f"{job.output.name}: {scheme.quantizer.title} would quantise it, and rows of it were "
            "trained: keep it with --keep-dense"
        )
        return [job]
    base, pieces = rows
    try:
        weight = scheme.quantizer.layout(job.output)
    except InputError as error:
        problems.append(f"{job.output.name}: {error} {error.hint}".strip())
        return [job]
    source = base.source
    if not pieces and isinstance(source, Encoded) and _is_stored_so(source, scheme, weight):
        return [Job(Copy(ref), ref.spec) for ref in (*source.parts.values(), *source.rest)]
    return [replace(job, op=Quantise(base, pieces, scheme.name, weight))]


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
