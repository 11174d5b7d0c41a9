"""Tied embeddings: DoRA on either end makes them two tensors, since its norms differ."""

from __future__ import annotations

from dataclasses import dataclass

from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Checkpoint
from dora_convert.planning.families import head_of, input_embedding, is_tied, ties_masked_head
from dora_convert.planning.match import Matching

__all__ = ["Ties", "untie"]


@dataclass(frozen=True, slots=True)
class Ties:
    """What becomes of a tie.

    `broken`: the config must say so. `head`: a tensor to be written with the values that the
    tensor `source` had before the merge, since only the input end was adapted.
    """

    broken: bool = False
    head: str | None = None
    source: str | None = None


def untie(adapter: Adapter, checkpoint: Checkpoint, matching: Matching) -> Ties:
    """Decide it, and say it in `matching.notes` (or `problems` where it cannot be done)."""
    stored_heads = [n for n in checkpoint.tensors if head_of(n.removesuffix(".weight"))]
    inputs = [n for n in checkpoint.tensors if input_embedding(n.removesuffix(".weight"))]
    adapted = {r.tensor for t in matching.targets if t.creates is None for r in t.rows}
    changed_inputs = [n for n in inputs if n in adapted or n in matching.replaced]
    if changed_inputs and ties_masked_head(checkpoint.config):
        matching.problems.append(
            f"the adapter changes {changed_inputs[0]}, which a masked language model also uses "
            "as its output layer: the two cannot be separated in its checkpoint"
        )
    if not is_tied(checkpoint.config, head_stored=bool(stored_heads)):
        return Ties()
    created = [t.creates for t in matching.targets if t.creates is not None]
    new_heads = created + [n for n in matching.replaced if head_of(n.removesuffix(".weight"))]
    changed_heads = new_heads + [n for n in stored_heads if n in adapted]
    if not changed_inputs and not changed_heads:
        _patch_stored_heads(inputs, stored_heads, matching)
        return Ties()
    if adapter.keeps_ties and _both_replaced(changed_inputs, new_heads, matching):
        for name in set(new_heads) - set(stored_heads):
            del matching.replaced[name]
        return Ties()
    if checkpoint.config.get("is_encoder_decoder"):
        matching.problems.append(
            "the adapter changes the tied embeddings of an encoder-decoder model, whose "
            "forward pass depends on the tie: they cannot be separated"
        )
        return Ties()
    matching.notes.append(
        "input and output embeddings were tied: both are written, tie_word_embeddings is false"
    )
    if changed_inputs and not changed_heads and not stored_heads:
        return Ties(broken=True, head="lm_head.weight", source=changed_inputs[0])
    return Ties(broken=True)


def _both_replaced(inputs: list[str], heads: list[str], matching: Matching) -> bool:
    return bool(inputs and heads) and all(n in matching.replaced for n in (*inputs, *heads))


def _patch_stored_heads(inputs: list[str], heads: list[str], matching: Matching) -> None:
    """Trained token rows of a tied model belong to both ends, also where both are stored."""
    for name in inputs:
        if name in matching.patches:
            for head in heads:
                matching.patches.setdefault(head, matching.patches[name])
