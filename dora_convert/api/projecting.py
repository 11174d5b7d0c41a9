"""`to-lora`: the best plain LoRA of a chosen rank, with what it loses."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.bases import base_name, fetch_merged, open_base
from dora_convert.api.cards import lora_figures, write_card
from dora_convert.api.fitting import open_fitting
from dora_convert.api.merging import Silent
from dora_convert.api.outcome import (
    advice,
    allowed_rank,
    lora_notes,
    pooled,
    pooled_weighted,
    rank_notes,
)
from dora_convert.api.progressing import Work
from dora_convert.api.reading import ReadOptions, checked, named_base, read_adapter, worker_count
from dora_convert.api.settling import settled
from dora_convert.api.weighting import check_weighting, weighting
from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.lora import (
    DEFAULT_RANK,
    FitReport,
    LoraLayer,
    LoraModule,
    LoraReport,
    RankChoice,
)
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, MismatchError, VerificationError
from dora_convert.loras import loras
from dora_convert.planning.lora import (
    Lora,
    affordable_rank,
    copy_problems,
    lora_layers,
    stack_problems,
    targets,
)
from dora_convert.planning.planner import Proposal, plan_merge
from dora_convert.planning.stacks import STACKS, WITHOUT_LORA, Stack, reading
from dora_convert.storage.fingerprint import inputs_of
from dora_convert.storage.sidefiles import write_documents
from dora_convert.storage.sparse import released
from dora_convert.storage.staging import Staging, check_output
from dora_convert.storage.sums import write_sums

if TYPE_CHECKING:
    from dora_convert.core.protocols import Listener
    from dora_convert.execution.lanes import Buffers

__all__ = ["LoraOptions", "to_lora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """What LoRA to make, and how.

    `choice`: of ranks; by default DEFAULT_RANK, and a plain LoRA is left as it is.
    `stack`: who is to load it, a key of `STACKS`. `form`: the file format, a name of `loras`; the
    stack's first if None. `compact`: a rank for each module, where the stack reads patterns;
    otherwise all are padded to one. `exact`: full decompositions. `limit`: the largest relative
    residual, over all modules, that is not an error. `device`, `max_memory`: where the iteration's
    products are computed, as for a merge. `weight`: "norm" weights errors by the gain of
    the norm before a module, "plain" does not; by default "norm" where there is one, and "plain"
    with `fit`. `stats` is a file to weight them by instead. `fit`: a file of texts, on which the
    factors are then fitted to the whole model's outputs.
    """

    choice: RankChoice | None = None
    stack: str = "any"
    form: str | None = None
    compact: bool = False
    dtype: DType = DType.F32
    exact: bool = False
    seed: int = 0
    limit: float | None = None
    weight: str | None = None
    stats: Path | None = None
    fit: Path | None = None
    workers: int | None = None
    device: str = "cpu"
    max_memory: int | None = None
    overwrite: bool = False

    @property
    def start(self) -> str | None:
        """The weighting; a fit starts no better from weighted factors (docs/to-lora.md)."""
        return "plain" if self.fit is not None and self.weight is None else self.weight

    @property
    def ranking(self) -> RankChoice:
        """The choice of ranks, made or by default."""
        return self.choice or RankChoice(rank=DEFAULT_RANK)


@released()
def to_lora(
    adapter: Path,
    output: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    how: LoraOptions | None = None,
    listener: Listener | None = None,
) -> LoraReport:
    """Approximate the effective update of every module, and write it as a LoRA.

    A plain LoRA is left alone, with a report that says so, unless `how.choice` is given.
    Raises InputError, MismatchError (also for what the stack cannot load), OutputError, and
    VerificationError where `how.limit` is exceeded.
    """
    options, how = options or ReadOptions(), how or LoraOptions()
    begun = time.perf_counter()
    stack = _stack(how)
    found = read_adapter(adapter, options)
    if how.choice is None and _is_plain(found):
        return _nothing(found, adapter, how, begun)
    base = base or named_base(found)
    check_output(output, inputs=(adapter, base), overwrite=how.overwrite)
    # A model that is run, and a mark of the base, take all of it.
    checkpoint = open_base(base, options, in_part=how.fit is None and how.stats is None)
    found = settled(found, checkpoint, transposed=options.transposed)
    proposal = plan_merge(found, checkpoint, transposed=options.transposed)
    _check_stack(found, checkpoint, proposal, stack, adapter)
    fetch_merged(proposal.plan)
    # Of the plan's own notes most are about the files of a merge.
    notes = [*found.notes, *checked(proposal, found, adapter, base, base_stays=True)]
    seconds = {"plan": time.perf_counter() - begun}
    made = _write(output, found, checkpoint, proposal, stack, how, listener or Silent())
    seconds["total"] = time.perf_counter() - begun
    residual = pooled(made.modules, [module.residual for module in made.modules])
    return LoraReport(
        output=str(output),
        adapter=str(adapter),
        base=base_name(checkpoint, base),
        stack=how.stack,
        rank=made.rank,
        nbytes=made.nbytes,
        residual=residual,
        without_magnitude=pooled(made.modules, [m.without_magnitude for m in made.modules]),
        weighted_residual=pooled_weighted(made.modules),
        fit=made.fit,
        modules=made.modules,
        notes=(*notes, *made.notes),
        advice=advice(residual, made.rank, stack),
        seconds=seconds,
    )


def _is_plain(adapter: Adapter) -> bool:
    """Whether it is a LoRA already."""
    modules = adapter.modules.values()
    return bool(modules) and all(module.magnitude is None for module in modules)


def _nothing(adapter: Adapter, name: Path, how: LoraOptions, begun: float) -> LoraReport:
    return LoraReport(
        output=None,
        adapter=str(name),
        base=adapter.base_model,
        stack=how.stack,
        rank=0,
        nbytes=0,
        residual=0.0,
        without_magnitude=0.0,
        weighted_residual=None,
        fit=None,
        modules=(),
        notes=(),
        advice="nothing to do: the adapter has no magnitudes, it is a plain LoRA already; "
        "with --rank it is made smaller",
        seconds={"total": time.perf_counter() - begun},
    )


def _stack(how: LoraOptions) -> Stack:
    _check_choice(how.ranking)
    check_weighting(how.weight, how.stats)
    if how.stack in WITHOUT_LORA:
        raise InputError(
            f"{WITHOUT_LORA[how.stack]} loads no LoRA at all",
            hint="Merge the adapter instead (dora-convert merge).",
        )
    if how.stack not in STACKS:
        known = ", ".join(STACKS)
        raise InputError(f"there is no stack named {how.stack!r}", hint=f"Known: {known}.")
    stack = _reading(STACKS[how.stack], how.form)
    top = max(stack.ranks or (0,))
    if how.ranking.rank is not None and top and how.ranking.rank > top:
        raise InputError(
            f"rank {how.ranking.rank} cannot be loaded by {stack.title}",
            hint=f"The largest rank there is {top}.",
        )
    if how.compact and not stack.patterns:
        raise InputError(
            f"a rank for each module is not read by {stack.title}", hint="Leave --compact out."
        )
    return stack


def _reading(stack: Stack, form: str | None) -> Stack:
    """The stack as it reads this file format alone."""
    form = form or stack.forms[0]
    loras.get(form)
    if form not in stack.forms:
        raise InputError(
            f"{stack.title} loads no LoRA in the file format {form}",
            hint=f"It loads: {', '.join(stack.forms)}.",
        )
    return replace(reading(stack, form), forms=(form,))


def _check_choice(choice: RankChoice) -> None:
    given = [choice.rank, choice.energy, choice.max_residual, choice.budget]
    shares = [share for share in (choice.energy, choice.max_residual) if share is not None]
    if sum(value is not None for value in given) != 1:
        raise InputError("exactly one of rank, energy, max_residual and budget is to be given")
    if min(choice.ceiling, 1 if choice.rank is None else choice.rank) < 1:
        raise InputError("a rank is 1 or more")
    if not all(0 < share < 1 for share in shares):
        raise InputError("energy and max_residual are shares, between 0 and 1")


def _check_stack(
    adapter: Adapter, checkpoint: Checkpoint, proposal: Proposal, stack: Stack, name: Path
) -> None:
    if not adapter.modules:
        raise InputError("the adapter has no module that a LoRA could stand for", where=str(name))
    problems = [
        *stack_problems(adapter, checkpoint, stack),
        *copy_problems(adapter, proposal.weights),
    ]
    if problems:
        raise MismatchError(
            f"not all of this adapter can be loaded by {stack.title} as a LoRA",
            where=str(name),
            problems=problems,
            hint="Merge it instead (dora-convert merge), or leave these out with --exclude or "
            "--ignore.",
        )


@dataclass(frozen=True, slots=True)
class _Written:
    modules: tuple[LoraModule, ...]
    rank: int  # the stored one
    nbytes: int
    fit: FitReport | None
    notes: list[str]


def _write(
    output: Path,
    adapter: Adapter,
    checkpoint: Checkpoint,
    proposal: Proposal,
    stack: Stack,
    how: LoraOptions,
    listener: Listener,
) -> _Written:
    """Compute, choose ranks, fit where that is wanted, write."""
    from dora_convert.execution.factors import Scratch, write_pairs
    from dora_convert.execution.project import Search, project
    from dora_convert.execution.ranks import choose_ranks

    parts = targets(proposal.plan)
    layers = lora_layers(adapter, checkpoint, proposal, stack)
    form = loras.get(stack.forms[0])
    lora = Lora(
        adapter,
        checkpoint.config,
        proposal.names,
        layers,
        dict.fromkeys((layer.path for layer in layers), 1),
        how.dtype,
    )
    form.lay_out(lora)  # what it cannot hold is said before the work
    weights, notes = weighting(how.start, how.stats, layers, proposal.names, checkpoint)
    fitting = open_fitting(how.fit, layers, checkpoint, how.seed) if how.fit else None
    choice = _bounded(how, stack, layers)
    notes += rank_notes(how.ranking, choice, stack)
    work = Work(parts, listener, fitting.steps if fitting else 0)
    most = allowed_rank(choice.rank or choice.ceiling, stack)
    # The scratch files, always of 32 bits, and what is made of them.
    room = sum(sum(layer.shape) for layer in layers) * most * (4 + how.dtype.bits // 8)
    inputs = inputs_of(proposal.plan)
    lanes = _lanes(how, proposal)
    with Staging(output, nbytes=room, overwrite=how.overwrite) as staging:
        scratch = Scratch(staging.dir / "scratch", list(parts))
        spectra = project(
            parts,
            choice,
            work.watched(scratch.keep),
            workers=worker_count(how.workers),
            search=Search(exact=how.exact, seed=how.seed, weights=weights),
            lanes=lanes,
        )
        ranks = choose_ranks(spectra, choice, element_bytes=how.dtype.bits // 8)
        stored = _stored_ranks(layers, ranks, stack, compact=how.compact)
        # Room that the stack asks for anyway is filled with what there is, not with zeros.
        ranks = {path: min(stored[path], len(spectra[path].singular)) for path in ranks}
        modules = tuple(spectra[path].report(ranks[path]) for path in sorted(spectra))
        top = max(stored.values())
        notes += lora_notes(layers, modules, choice, stack, top)
        fit = None
        if fitting is not None:
            modules, fit = fitting.run(parts, ranks, scratch, weights, modules, work.step)
        _check_limit(modules, how.limit)
        _check_range(modules, stack, how.dtype)
        file = form.lay_out(replace(lora, ranks=stored))
        write_pairs(staging.dir, file, ranks, scratch)
        shutil.rmtree(staging.dir / "scratch")
        write_documents(file.documents, staging.dir)
        write_card(staging.dir, lora_figures(adapter, checkpoint.root, modules, fit))
        write_sums(staging.dir, {})
        inputs.require_unchanged()
        staging.publish()
    return _Written(modules, top, sum(pair.nbytes for pair in file.pairs), fit, notes)


def _lanes(how: LoraOptions, proposal: Proposal) -> Callable[[], Buffers]:
    from dora_convert.execution import devices

    workers = worker_count(how.workers)
    chosen = devices.named_for_products(how.device, proposal.plan, workers=workers)
    return devices.lanes(chosen, workers=workers, max_memory=how.max_memory)


def _bounded(how: LoraOptions, stack: Stack, layers: Sequence[LoraLayer]) -> RankChoice:
    """The choice within what stack and shapes allow; a budget for padded pairs is a rank.

    One rank for all is the stored one.
    """
    choice, full = how.ranking, max(min(layer.shape) for layer in layers)
    if stack.slender:
        full = min(min(layer.shape) for layer in layers) - 1
    ceiling = min(choice.ceiling, full, stack.ranks[-1] if stack.ranks else full)
    if choice.rank is not None:
        rank = choice.rank if how.compact else allowed_rank(choice.rank, stack)
        return replace(choice, rank=min(rank, full), ceiling=ceiling)
    if choice.budget is None:
        return replace(choice, ceiling=ceiling)
    width = how.dtype.bits // 8
    # Where each pair has a rank of its own, the least is 1, whatever the stack's list.
    least = replace(stack, ranks=None) if how.compact else stack
    rank = affordable_rank(layers, least, choice.budget // width)
    if not rank:
        needed = width * sum(sum(layer.shape) for layer in layers) * allowed_rank(1, least)
        raise InputError(
            f"the budget is too small for any rank that {stack.title} loads",
            hint=f"The least is {needed} bytes.",
        )
    if how.compact:
        return replace(choice, ceiling=ceiling)
    return RankChoice(rank=min(rank, ceiling), ceiling=ceiling)


def _check_range(modules: Iterable[LoraModule], stack: Stack, dtype: DType) -> None:
    """No factor may leave the range of float16: none has a larger element than sqrt(||T||)."""
    if not (stack.half or dtype is DType.F16):
        return
    problems = [m.path for m in modules if math.sqrt(m.update) > 65504]
    if problems:
        raise MismatchError(
            "some factors may be too large for float16",
            problems=problems,
            hint="Choose another --dtype, and a stack that does not compute in float16.",
        )


def _check_limit(modules: Iterable[LoraModule], limit: float | None) -> None:
    modules = list(modules)
    residual = pooled(modules, [module.residual for module in modules])
    if limit is not None and residual > limit:
        raise VerificationError(
            f"the LoRA would miss {residual:.1%} of the update, more than the {limit:.1%} allowed",
            hint="Choose a larger rank, or merge the adapter instead.",
        )


def _stored_ranks(
    layers: Iterable[LoraLayer], ranks: Mapping[str, int], stack: Stack, *, compact: bool
) -> dict[str, int]:
    """The rank of each pair on disk: what the stack allows, the same for all unless compact."""
    top = allowed_rank(max(ranks.values()), stack)
    if not compact:
        return {layer.path: top for layer in layers}
    # Within patterns any rank up to the largest will do.
    return {layer.path: max(ranks.get(layer.path, 1), 1) for layer in layers}
