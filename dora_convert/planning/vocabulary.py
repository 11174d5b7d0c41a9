"""Embeddings and heads of the result have one vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dora_convert.core.bundle import Checkpoint
from dora_convert.core.tensors import TensorSpec
from dora_convert.planning.families import head_of, input_embedding

__all__ = ["vocabulary_ends", "vocabulary_problems"]


def vocabulary_problems(checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> list[str]:
    """Say where one end got another number of tokens and the other did not.

    A head that the base does not hold is measured by its one input embedding.
    """
    was = {name: ref.spec.shape for name, ref in checkpoint.tensors.items()}
    ends = vocabulary_ends(specs)
    inputs = [s for s in ends if input_embedding(s.name.removesuffix(".weight"))]
    found = []
    for end in ends:
        if end.name in was:
            # Those that had its size before it was resized, and still have it.
            old = next(iter(was[end.name]), None)
            others = [t for t in ends if was.get(t.name, ())[:1] == (old,) == t.shape[:1]]
            others = others if end.shape[0] != old else []
        else:
            others = [t for t in inputs[:1] if len(inputs) == 1 and t.shape != end.shape]
        found += [
            f"{end.name} {list(end.shape)} and {other.name} {list(other.shape)} would not have the "
            "same vocabulary: the adapter does not hold the other end at its new size"
            for other in others
        ]
    return found


def vocabulary_ends(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The embeddings and heads among them: matrices with a row for each token."""
    found = []
    for spec in specs:
        path = spec.name.removesuffix(".weight")
        if path != spec.name and len(spec.shape) == 2 and (input_embedding(path) or head_of(path)):
            found.append(spec)
    return found
