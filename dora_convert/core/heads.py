"""Attention heads as a model's config gives them, and rows that are ordered by them."""

from __future__ import annotations

from dataclasses import dataclass

from dora_convert.core.adapter import RowOrder
from dora_convert.core.bundle import Json
from dora_convert.core.tensors import TensorRef

__all__ = ["Heads", "heads", "reordered"]


@dataclass(frozen=True, slots=True)
class Heads:
    """`query` heads of `dim` rows each; every one of `groups` key and value heads serves some."""

    query: int
    groups: int
    dim: int


def heads(config: Json) -> Heads | None:
    """None where the config, one of transformers' for a language model, does not say."""
    query = _count(config.get("num_attention_heads"))
    groups = _count(config.get("num_key_value_heads")) or query
    width = _count(config.get("hidden_size"))
    dim = _count(config.get("head_dim")) or (width // query if query else 0)
    if not query or not dim or query % groups:
        return None
    return Heads(query, groups, dim)


def reordered(ref: TensorRef, order: RowOrder, dim: int) -> TensorRef:
    """Rows that are in this order, put into that of the weight; `dim` is a head's rows.

    `RowOrder` tells the two orders apart; each undoes the other. `dim` is even and divides the
    number of rows.
    """
    if order is RowOrder.SAME:
        return ref
    rows, *rest = ref.spec.shape
    pairs = (dim // 2, 2) if order is RowOrder.INTERLEAVED else (2, dim // 2)
    split = ref.reshaped(rows // dim, *pairs, *rest)
    axes = (0, 2, 1, *range(3, len(split.spec.shape)))
    return split.permuted(*axes).reshaped(rows, *rest)


def _count(value: object) -> int:
    usable = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if usable and isinstance(value, int) else 0
