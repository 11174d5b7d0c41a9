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
    heads = [n for n in checkpoint.tensors if head_of(n.removesuffix(".weight"))]
    inputs = [n for n in checkpoint.tensors if input_embedding(n.removesuffix(".weight"))]
    adapted = {r.tensor for t in matching.targets if t.creates is None for r in t.rows}
    changed_inputs = [n for n in inputs if n in adapted or n in matching.replaced]
    created = [t.creates for t in matching.targets if t.creates is not None]
    new_heads = created + [n for n in matching.replaced if head_of(n.removesuffix(".weight"))]
    changed_heads = [*new_heads, *(n for n in heads if n in adapted)]
    tied = is_tied(checkpoint.config, head_stored=bool(heads))
    _refuse_inseparable(checkpoint, changed_inputs, changed_heads, tied, matching)
    if tied is False:
        return Ties()
    patched = [n for n in (*inputs, *heads) if n in matching.patches]
    if not changed_inputs and not changed_heads:
        if patched and heads and tied is None:
            matching.problems.append(
                f"rows of {patched[0]} were trained, and the base's config does not say whether "
                f"{heads[0]} is the same tensor: add tie_word_embeddings to its config.json"
            )
        _patch_stored_heads(inputs, heads, matching)
        return Ties()
    if patched and tied:
        matching.problems.append(
            f"token rows of {patched[0]} were trained, and the tied {(*changed_heads, *inputs)[0]} "
            "was adapted as well: which rows that one had is not in the file"
        )
    if adapter.keeps_ties and all(
        n in matching.replaced for n in (*changed_inputs, *changed_heads)
    ):
        _replace_both(inputs, heads, new_heads, matching)
        return Ties()
    if tied is None and not heads:
        matching.problems.append(
            f"the adapter changes {changed_inputs[0]}, and the base's config does not say whether "
            "the output head is the same tensor: add tie_word_embeddings to its config.json"
        )
    if tied is None:
        return Ties(broken=True)
    matching.notes.append(
        "input and output embeddings were tied: both are written, tie_word_embeddings is false"
    )
    if changed_inputs and not changed_heads and not heads:
        return Ties(broken=True, head="lm_head.weight", source=changed_inputs[0])
    return Ties(broken=True)


def _refuse_inseparable(
    checkpoint: Checkpoint,
    inputs: list[str],
    heads: list[str],
    tied: bool | None,
    matching: Matching,
) -> None:
    """Changed ends of models that use one embedding in several places, whatever the flag says."""
    if inputs and ties_masked_head(checkpoint.config):
        matching.problems.append(
            f"the adapter changes {inputs[0]}, which a masked language model also uses "
            "as its output layer: the two cannot be separated in its checkpoint"
        )
    shared = [n for n in inputs if n.removesuffix(".weight").endswith("shared")]
    if shared or (tied is not False and checkpoint.config.get("is_encoder_decoder")):
        matching.problems += [
            f"the adapter changes {name}, one of the tied embeddings of an encoder-decoder model, "
            "whose forward pass depends on the tie: they cannot be separated"
            for name in (*inputs, *heads)[:1]
        ]


def _replace_both(
    inputs: list[str], heads: list[str], new_heads: list[str], matching: Matching
) -> None:
    """What was trained as one tensor goes wherever the base stores it, and nowhere else."""
    ref = next(matching.replaced[n] for n in (*inputs, *new_heads) if n in matching.replaced)
    for name in (*inputs, *heads):
        matching.replaced.setdefault(name, ref.renamed(name))
    for name in set(new_heads) - set(heads):
        del matching.replaced[name]


def _patch_stored_heads(inputs: list[str], heads: list[str], matching: Matching) -> None:
    """Trained token rows of a tied model belong to both ends, also where both are stored."""
    for name in inputs:
        if name in matching.patches:
            for head in heads:
                matching.patches.setdefault(head, matching.patches[name])
