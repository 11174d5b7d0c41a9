"""Weighted factors against whitening with a full SVD, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dora_convert.maths.lowrank import exact_factors
from dora_convert.maths.weighting import Weight, Weighted, unweighted


@dataclass
class Dense:
    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def times(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def transposed_times(self, y: Tensor) -> Tensor:
        return self.matrix.T @ y


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


WEIGHTS = {
    "diagonal": Weight(None, normal(20, seed=1).abs() + 0.1),
    "root": Weight(normal(20, 20, seed=2), None),
    "both": Weight(3 * normal(20, 4, seed=3), normal(20, seed=4).abs() + 0.1),
}


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("out", [13, 35])
def test_the_optimum(name: str, rank: int, out: int) -> None:
    weight, update = WEIGHTS[name], normal(out, 20, seed=5)
    moment = torch.zeros(20, 20, dtype=torch.float64)
    if weight.factor is not None:
        moment += weight.factor @ weight.factor.T
    if weight.diagonal is not None:
        moment += torch.diag(weight.diagonal**2)
    # The textbook way, through a Cholesky root and its inverse.
    root = torch.linalg.cholesky(moment)
    u, s, v = torch.linalg.svd(update @ root, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)

    operator = Dense(update)
    found = exact_factors(Weighted(operator, weight)).truncated(rank)
    factors = unweighted(operator, found.left)
    product = factors.left * factors.singular @ factors.right
    assert torch.allclose(product, best, atol=1e-8)
    assert torch.allclose(found.singular, s[:rank])
    columns = update.square().sum(dim=0)
    assert weight.square(operator, columns) == pytest.approx(float(s.square().sum()), rel=1e-10)
    held = float(factors.singular.square().sum())
    missed = float((update - product).square().sum())
    assert held + missed == pytest.approx(float(update.square().sum()), rel=1e-10)
