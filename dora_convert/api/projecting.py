"""`to-lora`: the best plain LoRA of a chosen rank, with what it loses."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dora_convert.api.reading import ReadOptions, checked, named_base, read_adapter, worker_count
from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.lora import LoraLayer, LoraModule, LoraReport, RankChoice
from dora_convert.core.plan import Document, Plan, WrittenFile
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, MismatchError, VerificationError
from dora_convert.planning.lora import (
    adapter_config,
    lora_layers,
    lora_specs,
    stack_problems,
    targets,
)
from dora_convert.planning.planner import plan_merge
from dora_convert.planning.stacks import STACKS, Stack
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.sidefiles import write_documents
from dora_convert.storage.staging import Staging, check_output

__all__ = ["LoraOptions", "to_lora"]

DEFAULT_RANK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """What LoRA to make, and how.

    `stack`: who is to load it, a key of `STACKS`. `compact`: a rank for each module, where the
    stack reads patterns; otherwise all are padded to one. `exact`: full decompositions. `limit`:
    the largest relative residual, over all modules, that is not an error.
    """

    choice: RankChoice = field(default_factory=lambda: RankChoice(rank=DEFAULT_RANK))
    stack: str = "any"
    compact: bool = False
    dtype: DType = DType.F32
    exact: bool = False
    seed: int = 0
    limit: float | None = None
    workers: int | None = None
    overwrite: bool = False


def to_lora(
    adapter: Path,
    output: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    how: LoraOptions | None = None,
) -> LoraReport:
    """Approximate the effective update of every module, and write it as a PEFT LoRA.

    Raises InputError, MismatchError (also for what the stack cannot load), OutputError, and
    VerificationError where `how.limit` is exceeded.
    """
    options, how = options or ReadOptions(), how or LoraOptions()
    begun = time.perf_counter()
    stack = _stack(how)
    found = read_adapter(adapter, options)
    base = base or named_base(found)
    check_output(output, inputs=(adapter, base), overwrite=how.overwrite)
    checkpoint = open_checkpoint(base, allow_pickle=options.allow_pickle)
    proposal = plan_merge(found, checkpoint, transposed=options.transposed)
    problems = stack_problems(found, stack)
    if problems:
        raise MismatchError(
            f"{stack.title}: not all of this adapter can be loaded there",
            where=str(adapter),
            problems=problems,
            hint="Merge it instead (dora-convert merge), or leave these out with --exclude or "
            "--ignore.",
        )
    notes = [*proposal.plan.notes, *checked(proposal, found, adapter, base)]
    seconds = {"plan": time.perf_counter() - begun}
    modules, rank, nbytes = _write(output, found, checkpoint, proposal.plan, stack, how, notes)
    seconds["total"] = time.perf_counter() - begun
    residual = _pooled(modules, [module.residual for module in modules])
    return LoraReport(
        output=str(output),
        adapter=str(adapter),
        base=str(base),
        stack=how.stack,
        rank=rank,
        nbytes=nbytes,
        residual=residual,
        without_magnitude=_pooled(modules, [module.without_magnitude for module in modules]),
        modules=modules,
        notes=tuple(notes),
        advice=_advice(residual, rank, stack),
        seconds=seconds,
    )


def _stack(how: LoraOptions) -> Stack:
    if how.stack not in STACKS:
        known = ", ".join(STACKS)
        raise InputError(f"there is no stack named {how.stack!r}", hint=f"Known: {known}.")
    stack = STACKS[how.stack]
    top = max(stack.ranks or (0,))
    if how.choice.rank is not None and top and how.choice.rank > top:
        raise InputError(
            f"rank {how.choice.rank} is more than {stack.title} loads",
            hint=f"Its largest rank is {top}.",
        )
    if how.compact and not stack.patterns:
        raise InputError(
            f"{stack.title} does not read a rank for each module", hint="Leave --compact out."
        )
    return stack


def _write(
    output: Path,
    adapter: Adapter,
    checkpoint: Checkpoint,
    plan: Plan,
    stack: Stack,
    how: LoraOptions,
    notes: list[str],
) -> tuple[tuple[LoraModule, ...], int, int]:
    """Compute, choose ranks, write; returns the modules' figures, the stored rank and bytes."""
    from dora_convert.execution.factors import Pair, Scratch, write_pairs
    from dora_convert.execution.project import project
    from dora_convert.execution.ranks import choose_ranks

    parts = targets(plan)
    layers = lora_layers(adapter, checkpoint, plan, stack)
    ceiling = (
        how.choice.ceiling if stack.ranks is None else min(how.choice.ceiling, stack.ranks[-1])
    )
    choice = replace(how.choice, ceiling=ceiling)
    room = sum(sum(layer.shape) for layer in layers) * (choice.rank or ceiling) * 8
    with Staging(output, nbytes=room, overwrite=how.overwrite) as staging:
        scratch = Scratch(staging.dir / "scratch", list(parts))
        spectra = project(
            parts,
            choice,
            scratch.keep,
            workers=worker_count(how.workers),
            exact=how.exact,
            seed=how.seed,
        )
        ranks = choose_ranks(spectra, choice, element_bytes=how.dtype.bits // 8)
        modules = tuple(spectra[path].report(ranks[path]) for path in sorted(spectra))
        _check_limit(modules, how.limit)
        stored = _stored_ranks(layers, ranks, stack, compact=how.compact)
        pairs = [
            Pair(layer, ranks.get(layer.path, 0), *lora_specs(layer, stored[layer.path], how.dtype))
            for layer in layers
        ]
        write_pairs(staging.dir / "adapter_model.safetensors", pairs, scratch)
        shutil.rmtree(staging.dir / "scratch")
        top = max(stored.values())
        config = adapter_config(adapter, checkpoint, layers, top, stored)
        documents: list[Document] = [WrittenFile("adapter_config.json", config)]
        write_documents(documents, staging.dir)
        staging.publish()
    empty = sum(layer.empty for layer in layers)
    if empty:
        notes.append(f"{empty} pairs of zeros added: some stacks need every layer to be there")
    if top > stack.advised:
        notes.append(f"{stack.title} is not made for ranks above {stack.advised}")
    if stack.launch:
        notes.append(f"serve it with {stack.launch.format(rank=_allowed(top, stack))}")
    nbytes = sum(pair.down.nbytes + pair.up.nbytes for pair in pairs)
    return modules, top, nbytes


def _check_limit(modules: Iterable[LoraModule], limit: float | None) -> None:
    modules = list(modules)
    residual = _pooled(modules, [module.residual for module in modules])
    if limit is not None and residual > limit:
        raise VerificationError(
            f"the LoRA would miss {residual:.1%} of the update, more than the {limit:.1%} allowed",
            hint="Choose a larger rank, or merge the adapter instead.",
        )


def _stored_ranks(
    layers: Iterable[LoraLayer], ranks: Mapping[str, int], stack: Stack, *, compact: bool
) -> dict[str, int]:
    """The rank of each pair on disk: what the stack allows, the same for all unless compact."""
    top = _allowed(max(ranks.values()), stack)
    if not compact:
        return {layer.path: top for layer in layers}
    # Within patterns any rank up to the largest will do.
    return {layer.path: max(ranks.get(layer.path, 1), 1) for layer in layers}


def _allowed(rank: int, stack: Stack) -> int:
    """The least rank that the stack takes and that holds `rank`."""
    rank = max(rank, 1)
    return rank if stack.ranks is None else next(r for r in stack.ranks if r >= rank)


def _pooled(modules: Iterable[LoraModule], relative: Iterable[float]) -> float:
    """A relative Frobenius error over all modules together."""
    modules = list(modules)
    total = sum(module.update**2 for module in modules)
    lost = sum((module.update * r) ** 2 for module, r in zip(modules, relative, strict=True))
    return math.sqrt(lost / total) if total else 0.0


def _advice(residual: float, rank: int, stack: Stack) -> str:
    kept = 1 - residual**2
    text = (
        f"rank {rank} keeps {kept:.1%} of the update's energy and misses {residual:.1%} of its size"
    )
    if residual > 0.05:
        text += "; merge the adapter instead if you can"
    elif stack.ranks is not None:
        text += f", and loads in {stack.title}"
    return text
