"""Ends of one model have one vocabulary. Expected messages are spelled out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.planning.vocabulary import vocabulary_problems

from ..core.values import checkpoint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, DType.F32, shape)


def test_one_end_resized() -> None:
    base = checkpoint({EMBED: (20, 8), HEAD: (20, 8)})
    (problem,) = vocabulary_problems(base, [spec(EMBED, 22, 8), spec(HEAD, 20, 8)])
    assert problem.startswith(f"{EMBED} [22, 8] and {HEAD} [20, 8] would not have the same vocab")
    assert vocabulary_problems(base, [spec(EMBED, 22, 8), spec(HEAD, 22, 8)]) == []


@pytest.mark.parametrize("shape", [(), (20,), (20, 8, 1)])
def test_what_is_no_matrix_is_no_vocabulary(shape: Sequence[int]) -> None:
    """Such a file is sound, and its tensor of that name is copied as any other."""
    base = checkpoint({EMBED: shape, HEAD: (20, 8)})
    assert vocabulary_problems(base, [spec(EMBED, *shape), spec(HEAD, 22, 8)]) == []
