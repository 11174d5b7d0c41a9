"""Matrices as operators, and what holds of any factors of theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_convert.maths.lowrank import Factors


@dataclass
class Matrix:
    """The operator that a matrix is."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def times(self, x: Tensor) -> Tensor:
        return self.matrix @ x.to(self.matrix.dtype)

    def transposed_times(self, y: Tensor) -> Tensor:
        return self.matrix.T @ y.to(self.matrix.dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def update(out: int, inner: int, *, spread: float, rank: int = 8, seed: int = 1) -> Tensor:
    """`c BA + (c - 1) W`, as DoRA's: a few large singular values, and W's own slow fall."""
    weight = normal(out, inner, seed=seed) * (0.5 + torch.rand(out, 1, generator=seeded(seed)))
    low = normal(out, rank, seed=seed + 1) @ normal(rank, inner, seed=seed + 2) * 0.05
    c = 1 + spread * normal(out, 1, seed=seed + 3)
    return c * low + (c - 1) * weight


def product(factors: Factors) -> Tensor:
    return factors.left * factors.singular @ factors.right


def optimum(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt())


def check_orthonormal(factors: Factors, tolerance: float = 1e-9) -> None:
    eye = torch.eye(len(factors.singular), dtype=torch.float64)
    torch.testing.assert_close(factors.left.T @ factors.left, eye, rtol=0, atol=tolerance)
    torch.testing.assert_close(factors.right @ factors.right.T, eye, rtol=0, atol=tolerance)
