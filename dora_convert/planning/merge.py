"""A matching to a plan: one job for each output tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dora_convert.core.adapter import Adapter, BiasRule, MagnitudeAxis
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.plan import Cast, Copy, Job, Merge, Op, PatchRows, Piece, Quantise, ScaleBias
from dora_convert.core.tensors import DType, Encoded, TensorRef
from dora_convert.planning.families import HEAD_TASKS, language_head, task_head
from dora_convert.planning.match import Matching, Target
from dora_convert.planning.ties import Ties

__all__ = ["Outputs", "merge_jobs"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Jobs by output tensor, in the checkpoint's order.

    `beside` names, for each tensor that the checkpoint does not hold, the stored one whose shard
    it goes into.
    """

    jobs: dict[str, Job]
    beside: dict[str, str]


def merge_jobs(
    adapter: Adapter,
    checkpoint: Checkpoint,
    matching: Matching,
    ties: Ties,
    *,
    dtype: DType | None = None,
) -> Outputs:
    """What is done for each tensor that the merged checkpoint holds.

    `dtype` replaces the element type of all plain floats; by default every tensor keeps its own.
    """
    pieces, bases = _pieces(matching)
    biases = _scaled_biases(checkpoint, matching, pieces, bases)
    dropped = _dropped_heads(adapter, checkpoint, matching)
    jobs: dict[str, Job] = {}
    for name, ref in checkpoint.tensors.items():
        if name not in dropped:
            op: Op
            if name in pieces:
                op = Merge(bases.get(name, ref).matrix(), tuple(pieces[name]))
            elif name in biases:
                op = biases[name]
            elif name in matching.patches:
                patch = matching.patches[name]
                op = PatchRows(patch.weight or ref, patch)
            else:
                op = Copy(matching.replaced.get(name, ref))
            jobs[name] = _job(name, op, ref.spec.dtype, bases.get(name, ref), dtype)
    beside: dict[str, str] = {}
    for name, op, source in _created(checkpoint, matching, ties):
        stored = checkpoint.tensors.get(source)
        kind = stored.spec.dtype if stored is not None else _common_dtype(checkpoint)
        jobs[name] = _job(name, op, kind, None, dtype)
        beside[name] = source if stored is not None else list(checkpoint.tensors)[-1]
    return Outputs(jobs, beside)


def _pieces(matching: Matching) -> tuple[dict[str, list[Piece]], dict[str, TensorRef]]:
    """Pieces by stored tensor, in row order, and the adapter's own copies of whole weights."""
    pieces: dict[str, list[Piece]] = {}
    bases: dict[str, TensorRef] = {}
    for target in matching.targets:
        if target.creates is not None:
            continue
        offset = 0
        for part in target.rows:
            length = part.stop - part.start
            if target.module.weight is not None:
                bases[part.tensor] = target.module.weight
                length = target.module.weight.spec.shape[0]
            piece = Piece(part.start, part.start + length, target.module, offset)
            pieces.setdefault(part.tensor, []).append(piece)
            offset += length
    for parts in pieces.values():
        parts.sort(key=lambda piece: piece.start)
    return pieces, bases


def _scaled_biases(
    checkpoint: Checkpoint,
    matching: Matching,
    pieces: Mapping[str, list[Piece]],
    bases: Mapping[str, TensorRef],
) -> dict[str, ScaleBias]:
    """Biases of layers whose trainer scaled the whole output, by tensor name."""
    found = {}
    for name, parts in pieces.items():
        bias = name.removesuffix("weight") + "bias"
        scaled = tuple(
            part
            for part in parts
            if part.module.bias_rule is BiasRule.SCALED and part.module.magnitude is not None
        )
        if not scaled or bias not in checkpoint.tensors:
            continue
        base = bases.get(name, checkpoint.tensors[name]).matrix()
        source = matching.replaced.get(bias, checkpoint.tensors[bias])
        by_row = scaled[0].module.axis is MagnitudeAxis.OUT
        if source.spec.shape != (base.spec.shape[0 if by_row else 1],):
            matching.problems.append(
                f"{bias}: {list(source.spec.shape)} is no bias of {name}, whose trainer scaled it"
            )
            continue
        found[bias] = ScaleBias(source, base, scaled)
    return found


def _created(checkpoint: Checkpoint, matching: Matching, ties: Ties) -> list[tuple[str, Op, str]]:
    """Tensors that the checkpoint does not hold: (name, op, a stored tensor akin to it)."""
    created: list[tuple[str, Op, str]] = []
    for target in matching.targets:
        if target.creates is not None:
            created.append((target.creates, _whole(target, checkpoint), target.rows[0].tensor))
    for name, ref in matching.replaced.items():
        if name not in checkpoint.tensors:
            created.append((name, Copy(ref), ""))
    if ties.head is not None and ties.source is not None:
        # The values before the merge, as the trainer had them.
        own = [t.module.weight for t in matching.targets if t.rows[0].tensor == ties.source]
        shared = next(iter(own), None) or checkpoint.tensors[ties.source]
        created.append((ties.head, Copy(shared), ties.source))
    return created


def _whole(target: Target, checkpoint: Checkpoint) -> Merge:
    base = target.module.weight or checkpoint.tensors[target.rows[0].tensor]
    return Merge(base.matrix(), (Piece(0, base.spec.shape[0], target.module),))


def _job(name: str, op: Op, kind: DType, shaped: TensorRef | None, dtype: DType | None) -> Job:
    """The job with its output's name, shape and type; a Copy that changes type is a Cast."""
    if dtype is not None and kind.is_weight:
        kind = dtype
    match op:
        case Copy(source) | Cast(source):
            spec = replace(source.spec, name=name, dtype=kind)
            as_it_is = source.stored.dtype is kind and not isinstance(source.source, Encoded)
            return Job(op if as_it_is else Cast(source), spec)
        case Merge(base):
            return Job(op, replace((shaped or base).spec, name=name, dtype=kind))
        case Quantise():
            raise AssertionError(name)  # made of finished jobs
        case ScaleBias(source):
            return Job(op, replace(source.spec, name=name, dtype=kind))
        case PatchRows(base):
            return Job(op, replace(base.spec, name=name, dtype=kind))


def _dropped_heads(adapter: Adapter, checkpoint: Checkpoint, matching: Matching) -> frozenset[str]:
    """A classifier has no language model head: transformers would report it as unexpected."""
    if adapter.task not in HEAD_TASKS or not any(map(task_head, matching.replaced)):
        return frozenset()
    changed = {row.tensor for target in matching.targets for row in target.rows}
    changed |= matching.replaced.keys() | matching.patches.keys()
    heads = frozenset(n for n in checkpoint.tensors if language_head(n) and n not in changed)
    if heads:
        matching.notes.append(f"{', '.join(sorted(heads))} left out: the adapter is a classifier")
    return heads


def _common_dtype(checkpoint: Checkpoint) -> DType:
    counts = Counter(r.spec.dtype for r in checkpoint.tensors.values() if r.spec.dtype.is_weight)
    return counts.most_common(1)[0][0] if counts else DType.F32
