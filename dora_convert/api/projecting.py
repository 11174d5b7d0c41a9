"""`to-lora`: the best plain LoRA of a chosen rank, with what it loses."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dora_convert.api.reading import ReadOptions, checked, named_base, read_adapter, worker_count
from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.lora import DEFAULT_RANK, LoraLayer, LoraModule, LoraReport, RankChoice
from dora_convert.core.plan import Document, WrittenFile
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, MismatchError, VerificationError
from dora_convert.planning.lora import (
    adapter_config,
    affordable_rank,
    copy_problems,
    lora_layers,
    lora_specs,
    stack_problems,
    targets,
)
from dora_convert.planning.planner import Proposal, plan_merge
from dora_convert.planning.stacks import STACKS, Stack
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.sidefiles import write_documents
from dora_convert.storage.staging import Staging, check_output

__all__ = ["LoraOptions", "to_lora"]


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
    _check_stack(found, proposal, stack, adapter)
    # Of the plan's own notes most are about the files of a merge.
    notes = [*found.notes, *checked(proposal, found, adapter, base)]
    _check_copies(found, proposal, adapter)
    seconds = {"plan": time.perf_counter() - begun}
    modules, rank, nbytes = _write(output, found, checkpoint, proposal, stack, how, notes)
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
    _check_choice(how.choice)
    if how.stack not in STACKS:
        known = ", ".join(STACKS)
        raise InputError(f"there is no stack named {how.stack!r}", hint=f"Known: {known}.")
    stack = STACKS[how.stack]
    top = max(stack.ranks or (0,))
    if how.choice.rank is not None and top and how.choice.rank > top:
        raise InputError(
            f"rank {how.choice.rank} cannot be loaded by {stack.title}",
            hint=f"The largest rank there is {top}.",
        )
    if how.compact and not stack.patterns:
        raise InputError(
            f"a rank for each module is not read by {stack.title}", hint="Leave --compact out."
        )
    return stack


def _check_choice(choice: RankChoice) -> None:
    given = [choice.rank, choice.energy, choice.max_residual, choice.budget]
    shares = [share for share in (choice.energy, choice.max_residual) if share is not None]
    if sum(value is not None for value in given) != 1:
        raise InputError("exactly one of rank, energy, max_residual and budget is to be given")
    if min(choice.ceiling, 1 if choice.rank is None else choice.rank) < 1:
        raise InputError("a rank is 1 or more")
    if not all(0 < share < 1 for share in shares):
        raise InputError("energy and max_residual are shares, between 0 and 1")


def _check_stack(adapter: Adapter, proposal: Proposal, stack: Stack, name: Path) -> None:
    if not adapter.modules:
        raise InputError("the adapter has no module that a LoRA could stand for", where=str(name))
    problems = [*stack_problems(adapter, stack), *copy_problems(adapter, proposal.weights)]
    if problems:
        raise MismatchError(
            f"not all of this adapter can be loaded by {stack.title} as a LoRA",
            where=str(name),
            problems=problems,
            hint="Merge it instead (dora-convert merge), or leave these out with --exclude or "
            "--ignore.",
        )


def _check_copies(adapter: Adapter, proposal: Proposal, name: Path) -> None:
    """An update of the adapter's own copy of a weight is none of another base's."""
    from dora_convert.execution.probe import copy_differences
    from dora_convert.storage.reader import Reader

    different = copy_differences(adapter.modules.values(), proposal.weights, Reader())
    if different:
        raise MismatchError(
            "the adapter carries its own base weights, and the base holds others",
            where=str(name),
            problems=[f"{path}: a LoRA is added to the base's own" for path in different],
            hint="Pass the base that was trained on, or merge instead (dora-convert merge).",
        )


def _write(
    output: Path,
    adapter: Adapter,
    checkpoint: Checkpoint,
    proposal: Proposal,
    stack: Stack,
    how: LoraOptions,
    notes: list[str],
) -> tuple[tuple[LoraModule, ...], int, int]:
    """Compute, choose ranks, write; returns the modules' figures, the stored rank and bytes."""
    from dora_convert.execution.factors import Pair, Scratch, write_pairs
    from dora_convert.execution.project import project
    from dora_convert.execution.ranks import choose_ranks

    parts = targets(proposal.plan)
    layers = lora_layers(adapter, checkpoint, proposal, stack)
    choice = _bounded(how, stack, layers)
    most = _allowed(choice.rank or choice.ceiling, stack)
    # The scratch files, always of 32 bits, and what is made of them.
    room = sum(sum(layer.shape) for layer in layers) * most * (4 + how.dtype.bits // 8)
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
        config = adapter_config(adapter, proposal.names, layers, top, stored)
        documents: list[Document] = [WrittenFile("adapter_config.json", config)]
        write_documents(documents, staging.dir)
        staging.publish()
    notes += _notes(layers, modules, choice, stack, top)
    nbytes = sum(pair.down.nbytes + pair.up.nbytes for pair in pairs)
    return modules, top, nbytes


def _bounded(how: LoraOptions, stack: Stack, layers: Sequence[LoraLayer]) -> RankChoice:
    """The choice within what stack and shapes allow; a budget for padded pairs is a rank."""
    choice, full = how.choice, max(min(layer.shape) for layer in layers)
    ceiling = min(choice.ceiling, full, stack.ranks[-1] if stack.ranks else full)
    if choice.rank is not None:
        return replace(choice, rank=min(choice.rank, full), ceiling=ceiling)
    if choice.budget is None:
        return replace(choice, ceiling=ceiling)
    width = how.dtype.bits // 8
    # Where each pair has a rank of its own, the least is 1, whatever the stack's list.
    least = replace(stack, ranks=None) if how.compact else stack
    rank = affordable_rank(layers, least, choice.budget // width)
    if not rank:
        needed = width * sum(sum(layer.shape) for layer in layers) * _allowed(1, least)
        raise InputError(
            f"the budget is too small for any rank that {stack.title} loads",
            hint=f"The least is {needed} bytes.",
        )
    if how.compact:
        return replace(choice, ceiling=ceiling)
    return RankChoice(rank=min(rank, ceiling), ceiling=ceiling)


def _notes(
    layers: Sequence[LoraLayer],
    modules: Sequence[LoraModule],
    choice: RankChoice,
    stack: Stack,
    top: int,
) -> list[str]:
    notes = []
    empty = sum(layer.empty for layer in layers)
    if empty:
        notes.append(f"{empty} pairs of zeros added: some stacks need every layer to be there")
    if choice.share is not None:
        allowed = math.sqrt(1 - choice.share)
        short = sum(module.residual > allowed * (1 + 1e-6) + 1e-7 for module in modules)
        if short:
            notes.append(f"{short} modules would need a rank above {choice.ceiling} for that")
    if top > stack.advised:
        notes.append(f"ranks above {stack.advised} are not served well by {stack.title}")
    if stack.launch:
        notes.append(f"serve it with {stack.launch.format(rank=_allowed(top, stack))}")
    return notes


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
        text += f", and can be loaded by {stack.title}"
    return text
