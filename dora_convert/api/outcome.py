"""What is said of a finished LoRA: figures over all modules together, notes, advice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dora_convert.core.lora import LoraLayer, LoraModule, RankChoice
from dora_convert.planning.stacks import Stack

__all__ = ["advice", "allowed_rank", "lora_notes", "pooled", "pooled_weighted", "rank_notes"]


def allowed_rank(rank: int, stack: Stack) -> int:
    """The least rank that the stack takes and that holds `rank`."""
    rank = max(rank, 1)
    return rank if stack.ranks is None else next(r for r in stack.ranks if r >= rank)


def rank_notes(asked: RankChoice, bounded: RankChoice, stack: Stack) -> list[str]:
    """Why another rank than the one asked for is stored, if a stack is the reason."""
    if asked.rank is None or bounded.rank is None:
        return []
    if bounded.rank > asked.rank:
        return [
            f"rank {bounded.rank}, not {asked.rank}: {stack.title} stores no smaller one, and what "
            "it has room for is filled"
        ]
    if stack.slender and bounded.rank < asked.rank:
        return [
            f"rank {bounded.rank}, not {asked.rank}: {stack.title} reads a pair right only if the "
            "rank is below both sides of the layer"
        ]
    return []


def lora_notes(
    layers: Sequence[LoraLayer],
    modules: Sequence[LoraModule],
    choice: RankChoice,
    stack: Stack,
    top: int,
) -> list[str]:
    """What a user should know of it. `choice` is the bounded one, `top` the stored rank."""
    notes = []
    empty = sum(layer.empty for layer in layers)
    if empty:
        notes.append(f"{empty} pairs of zeros added: some stacks need every layer to be there")
    if choice.share is not None:
        allowed = math.sqrt(1 - choice.share)
        missed = [
            m.residual if m.weighted_residual is None else m.weighted_residual for m in modules
        ]
        short = sum(r > allowed * (1 + 1e-6) + 1e-7 for r in missed)
        if short:
            notes.append(f"{short} modules would need a rank above {choice.ceiling} for that")
    if top > stack.advised:
        notes.append(f"ranks above {stack.advised} are not served well by {stack.title}")
    if stack.launch:
        notes.append(f"serve it with {stack.launch.format(rank=allowed_rank(top, stack))}")
    return notes


def pooled(modules: Iterable[LoraModule], relative: Iterable[float]) -> float:
    """A relative Frobenius error over all modules together."""
    modules = list(modules)
    total = sum(module.update**2 for module in modules)
    lost = sum((module.update * r) ** 2 for module, r in zip(modules, relative, strict=True))
    return math.sqrt(lost / total) if total else 0.0


def pooled_weighted(modules: Iterable[LoraModule]) -> float | None:
    """The same of outputs, over the modules whose inputs were weighted."""
    found = [(m.weighted_update, m.weighted_residual) for m in modules]
    pairs = [(update, r) for update, r in found if r is not None]
    total = sum(update**2 for update, _ in pairs)
    if not pairs:
        return None
    return math.sqrt(sum((update * r) ** 2 for update, r in pairs) / total) if total else 0.0


def advice(residual: float, rank: int, stack: Stack) -> str:
    """A plain sentence."""
    kept = 1 - residual**2
    text = (
        f"rank {rank} keeps {kept:.1%} of the update's energy and misses {residual:.1%} of its size"
    )
    if residual > 0.05:
        text += "; merge the adapter instead if you can"
    elif stack.ranks is not None:
        text += f", and can be loaded by {stack.title}"
    return text
