"""Forms of updates against dense ones, by torch.kron and elementwise products, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dora_convert.maths.deltas import Delta, Dense, Hadamard, Kronecker, LowRank, nothing

from .operators import normal

OUT, IN = 24, 30


def pair(out: int, inner: int, rank: int, seed: int) -> LowRank:
    return LowRank(normal(out, rank, seed=seed), normal(rank, inner, seed=seed + 1))


def dense(factor: Dense | LowRank) -> Tensor:
    return factor.matrix if isinstance(factor, Dense) else factor.up @ factor.down


def low_rank() -> tuple[Delta, Tensor]:
    made = pair(OUT, IN, 3, 1)
    return made, dense(made)


def hadamard() -> tuple[Delta, Tensor]:
    left, right = pair(OUT, IN, 3, 1), pair(OUT, IN, 5, 3)
    return Hadamard(left, right), dense(left) * dense(right)


def kronecker(
    left: Dense | LowRank, right: Dense | LowRank, first: int = 0, count: int = OUT
) -> Callable[[], tuple[Delta, Tensor]]:
    product = torch.kron(dense(left), dense(right))[first : first + count]
    return lambda: (Kronecker(left, right, first, count), product)


FORMS = {
    "low rank": low_rank,
    "hadamard": hadamard,
    "kronecker": kronecker(Dense(normal(4, 5, seed=1)), Dense(normal(6, 6, seed=2))),
    "a tall left factor": kronecker(Dense(normal(24, 2, seed=1)), Dense(normal(1, 15, seed=2))),
    "kronecker of products": kronecker(pair(3, 2, 2, 1), pair(8, 15, 4, 3)),
    "some rows": kronecker(Dense(normal(7, 3, seed=1)), pair(5, 10, 2, 3), 8, OUT),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[Delta, Tensor]:
    return FORMS[request.param]()


@pytest.mark.parametrize("height", [1, 5, OUT])
def test_blocks_of_rows_are_those_of_the_whole(form: tuple[Delta, Tensor], height: int) -> None:
    delta, expected = form
    assert expected.shape == (OUT, IN)
    given = normal(OUT, IN, seed=9)
    added, filled = given.clone(), given.clone()
    for start in range(0, OUT, height):
        delta.add_to(added[start : start + height], start)
        delta.fill(filled[start : start + height], start)
    torch.testing.assert_close(added, given + expected)
    torch.testing.assert_close(filled, expected)


def test_rows_need_not_lie_one_after_the_other(form: tuple[Delta, Tensor]) -> None:
    delta, expected = form
    rows = torch.zeros((IN, OUT), dtype=torch.float64).T
    delta.add_to(rows[3:8], 3)
    torch.testing.assert_close(rows[3:8], expected[3:8])
    assert not rows[:3].any()
    assert not rows[8:].any()


def test_products(form: tuple[Delta, Tensor]) -> None:
    delta, expected = form
    x, y = normal(IN, 4, seed=7), normal(OUT, 2, seed=8)
    torch.testing.assert_close(delta.times(x), expected @ x)
    torch.testing.assert_close(delta.transposed_times(y), expected.T @ y)


def test_all_tensors_move(form: tuple[Delta, Tensor]) -> None:
    there = form[0].to(torch.device("meta"))
    rows, vectors = torch.empty((OUT, IN), device="meta"), torch.empty((IN, 2), device="meta")
    there.add_to(rows.double(), 0)
    assert there.times(vectors.double()).device.type == "meta"


def test_squares_of_a_product() -> None:
    made, expected = pair(OUT, IN, 3, 1), low_rank()[1]
    torch.testing.assert_close(made.row_squares(), expected.square().sum(dim=1))
    torch.testing.assert_close(made.column_squares(), expected.square().sum(dim=0))


def test_nothing() -> None:
    made = nothing(OUT, IN, torch.float64)
    rows = normal(OUT, IN, seed=1)
    made.fill(rows, 0)
    assert not rows.any()
    assert not made.times(normal(IN, 2, seed=2)).any()
    assert made.shape == (OUT, IN)
