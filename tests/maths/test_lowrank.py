"""All singular triples of an operator against full decompositions in float64."""

from __future__ import annotations

import pytest
import torch

from dora_convert.maths.lowrank import exact_factors
from tests.maths.operators import Matrix, check_orthonormal, normal, optimum, product, update


@pytest.mark.parametrize("shape", [(30, 30), (80, 20), (20, 80), (1, 9), (9, 1), (1, 1)])
def test_exact(shape: tuple[int, int]) -> None:
    matrix = update(*shape, spread=0.05)
    factors = exact_factors(Matrix(matrix))
    torch.testing.assert_close(product(factors), matrix, rtol=0, atol=1e-10 * float(matrix.norm()))
    for rank in range(min(shape) + 1):
        missed = float((matrix - product(factors.truncated(rank))).norm())
        assert missed == pytest.approx(optimum(matrix, rank), abs=1e-10 * float(matrix.norm()))


@pytest.mark.parametrize("shape", [(30, 30), (80, 20), (20, 80)])
def test_exact_of_low_rank(shape: tuple[int, int]) -> None:
    matrix = normal(shape[0], 5, seed=1) @ normal(5, shape[1], seed=2)
    factors = exact_factors(Matrix(matrix))
    torch.testing.assert_close(product(factors), matrix, rtol=0, atol=1e-7 * float(matrix.norm()))
    five = factors.truncated(5)
    torch.testing.assert_close(product(five), matrix, rtol=0, atol=1e-10 * float(matrix.norm()))
    check_orthonormal(five)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_exact_of_nothing(shape: tuple[int, int]) -> None:
    factors = exact_factors(Matrix(torch.zeros(shape, dtype=torch.float64)))
    assert len(factors.singular) == 0
    assert not product(factors).any()
    assert product(factors).shape == shape
    assert len(factors.truncated(3).singular) == 0
