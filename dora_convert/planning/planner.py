"""Adapter and checkpoint to a plan and its problems, in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Checkpoint, Json
from dora_convert.core.plan import Plan
from dora_convert.core.tensors import COMPONENT_MARK, DType, TensorRef
from dora_convert.planning.checks import refuse_quantized
from dora_convert.planning.documents import documents
from dora_convert.planning.families import transposed_modules
from dora_convert.planning.match import Matching, match
from dora_convert.planning.merge import merge_jobs
from dora_convert.planning.pack import own_shards, sized_shards
from dora_convert.planning.quantise import Scheme, quantised
from dora_convert.planning.resolve import Resolver
from dora_convert.planning.settle import unsettled
from dora_convert.planning.ties import untie
from dora_convert.planning.vocabulary import vocabulary_problems

__all__ = ["Proposal", "plan_merge"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan for all that fits, and every reason why it may not run.

    `weights` holds the stored weight of each module that is one whole tensor. `names` is how the
    adapter's paths were found in the checkpoint.
    """

    plan: Plan
    problems: tuple[str, ...]
    weights: Mapping[str, TensorRef]
    names: Resolver


def plan_merge(
    adapter: Adapter,
    checkpoint: Checkpoint,
    *,
    dtype: DType | None = None,
    max_shard_size: int | None = None,
    transposed: Sequence[str] = (),
    overrides: Mapping[str, Path] | None = None,
    scheme: Scheme | None = None,
) -> Proposal:
    """See DESIGN: every output's name, type, shape and shard, decided without reading data.

    `scheme`: what to store the weights in, by default as dense ones.

    Raises MismatchError for a quantised base; all else that is wrong is in `problems`.
    """
    refuse_quantized(checkpoint)
    matching = match(adapter, checkpoint, transposed=transposed)
    if checkpoint.schemes:
        result = "dense" if scheme is None else scheme.name
        matching.notes.append(
            f"the base is quantised ({', '.join(checkpoint.schemes)}): what is merged is what it "
            f"decodes to, and the result is {result}"
        )
    matching.problems += unsettled(adapter)
    ties = untie(adapter, checkpoint, matching)
    outputs = merge_jobs(adapter, checkpoint, matching, ties, dtype=dtype)
    specs = [job.output for job in outputs.jobs.values()]
    matching.problems += vocabulary_problems(checkpoint, specs)
    quantization: Json = {}
    if scheme is not None and any(COMPONENT_MARK in name for name in checkpoint.tensors):
        matching.problems.append(
            "the models of a pipeline are quantised one by one: give the folder of one as the base"
        )
    elif scheme is not None:
        flipped = transposed_modules(checkpoint.config, transposed)
        outputs, kept = quantised(outputs, scheme, flipped, matching.problems)
        quantization = scheme.quantizer.config(kept)
    if max_shard_size is None:
        shards = own_shards(outputs, checkpoint.shards, keep_name=not checkpoint.config)
    else:
        shards = sized_shards(outputs, max_shard_size, checkpoint.shards)
    files = documents(
        adapter,
        checkpoint,
        shards,
        ties,
        dtype=dtype,
        overrides=overrides,
        quantization=quantization,
    )
    return Proposal(
        plan=Plan(shards, files, tuple(matching.notes)),
        problems=tuple(matching.problems),
        weights=_weights(matching, checkpoint),
        names=matching.names,
    )


def _weights(matching: Matching, checkpoint: Checkpoint) -> dict[str, TensorRef]:
    return {
        target.module.path: checkpoint.tensors[target.rows[0].tensor]
        for target in matching.targets
        if len(target.rows) == 1
    }
