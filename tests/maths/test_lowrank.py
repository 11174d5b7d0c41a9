"""Low-rank factors of operators against full decompositions in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dora_convert.maths.lowrank import (
    Factors,
    exact_factors,
    krylov_factors,
    round_trip,
    spans_everything,
)


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


@pytest.mark.parametrize("spread", [0.003, 0.02, 0.1])
@pytest.mark.parametrize("shape", [(340, 300), (300, 400)])
def test_krylov_is_within_a_fifth_of_a_percent(shape: tuple[int, int], spread: float) -> None:
    matrix = update(*shape, spread=spread)
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 4, 8, 9, 20, 50):
        assert not spans_everything(shape, rank)
        factors = krylov_factors(Matrix(matrix), rank, seeded(), float(matrix.square().sum()))
        assert len(factors.singular) == rank
        best = float(values[rank:].square().sum().sqrt())
        missed = float((matrix - product(factors)).norm())
        assert best * (1 - 1e-9) <= missed <= best * 1.002
        # What the singular values say is what is missed.
        told = float((matrix.square().sum() - factors.singular.square().sum()).sqrt())
        assert told == pytest.approx(missed, rel=1e-6)
        assert bool((factors.singular.diff() <= 0).all())
        check_orthonormal(factors)


def test_krylov_in_single_precision() -> None:
    matrix = update(400, 320, spread=0.02)
    factors = krylov_factors(Matrix(matrix.float()), 16, seeded(), float(matrix.square().sum()))
    assert {factors.left.dtype, factors.singular.dtype, factors.right.dtype} == {torch.float64}
    assert float((matrix - product(factors)).norm()) <= 1.002 * optimum(matrix, 16)


@pytest.mark.parametrize("rank", [3, 8, 30])
def test_krylov_of_an_operator_of_low_rank(rank: int) -> None:
    matrix = normal(200, 8, seed=1) @ normal(8, 300, seed=2)
    factors = krylov_factors(Matrix(matrix), rank, seeded(), float(matrix.square().sum()))
    missed = float((matrix - product(factors)).norm())
    assert missed <= 1.002 * optimum(matrix, rank) + 1e-9 * float(matrix.norm())
    values = torch.linalg.svdvals(matrix)[:rank]
    torch.testing.assert_close(factors.singular, values, rtol=1e-9, atol=1e-9 * float(values[0]))


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (20, 20), (1, 7), (90, 100)])
@pytest.mark.parametrize("rank", [1, 15, 200])
def test_krylov_where_its_space_is_larger_than_all(shape: tuple[int, int], rank: int) -> None:
    matrix = update(*shape, spread=0.1)
    factors = krylov_factors(Matrix(matrix), rank, seeded(), float(matrix.square().sum()))
    kept = min(rank, *shape)
    values = torch.linalg.svdvals(matrix)
    assert len(factors.singular) == kept
    torch.testing.assert_close(factors.singular, values[:kept], rtol=1e-3, atol=1e-12)
    best = float(values[kept:].square().sum().sqrt())
    assert float((matrix - product(factors)).norm()) <= 1.002 * best + 1e-10


def test_krylov_of_nothing() -> None:
    factors = krylov_factors(Matrix(torch.zeros(100, 80, dtype=torch.float64)), 4, seeded(), 0.0)
    assert not factors.singular.any()
    assert bool(torch.isfinite(factors.left).all())
    assert bool(torch.isfinite(factors.right).all())


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


def test_a_space_that_spans_everything() -> None:
    assert spans_everything((192, 1000), 2)
    assert not spans_everything((1000, 193), 8)
    assert spans_everything((1000, 288), 64)
    assert not spans_everything((289, 1000), 64)


INDEX = torch.arange(1, 601, dtype=torch.float64)
# Singular values that fall slowly, or not in the way that an estimate of what is left expects.
SPECTRA = {
    "power 0.03": INDEX**-0.03,
    "power 0.3": INDEX**-0.3,
    "power 1": 1 / INDEX,
    "exponential": torch.exp(-INDEX / 100),
    "normal": torch.exp(-((INDEX / 160) ** 2) / 2),
    "linear": 1 - (INDEX - 1) / 600,
    "logarithm": 1 / torch.log(INDEX + 1),
    "cluster and tail": torch.where(INDEX <= 40, 1 - INDEX * 1e-4, 0.5 * torch.exp(-INDEX / 1500)),
    "cluster wider than a block": torch.where(INDEX <= 60, 1 - INDEX * 1e-4, 0.5 * INDEX**-0.1),
    "plateau and tail": torch.where(INDEX <= 100, 1 - INDEX * 1e-3, 0.05 * INDEX**-0.1),
}


@dataclass
class Counted:
    """Any operator has the same convergence as the diagonal one of its singular values."""

    values: Tensor
    columns: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), len(self.values)

    def times(self, x: Tensor) -> Tensor:
        self.columns += x.shape[1]
        return self.values.unsqueeze(1) * x

    transposed_times = times


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 16, 24, 48, 64])
def test_spectra_that_fall_slowly(name: str, rank: int) -> None:
    values = SPECTRA[name]
    factors = krylov_factors(Counted(values), rank, seeded(), float(values.square().sum()))
    best = float(values[rank:].norm())
    missed = float((torch.diag(values) - product(factors)).norm())
    assert best * (1 - 1e-9) <= missed <= best * 1.002
    told = float((values.square().sum() - factors.singular.square().sum()).sqrt())
    assert told == pytest.approx(missed, rel=1e-6)


def test_no_more_products_than_the_spectrum_asks_for() -> None:
    easy, hard = Counted(torch.where(INDEX <= 16, 1.0, 0.02).double()), Counted(SPECTRA["linear"])
    for operator in (easy, hard):
        krylov_factors(operator, 16, seeded(), float(operator.values.square().sum()))
    assert easy.columns <= 5 * 32 < hard.columns


@dataclass
class Passing(Matrix):
    """Both products at once."""

    readings: int = 0

    def times(self, x: Tensor) -> Tensor:
        self.readings += 1
        return super().times(x)

    def transposed_times(self, y: Tensor) -> Tensor:
        raise AssertionError("one reading would have done")

    def round_trip(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image = self.times(x)
        return image, self.matrix.T @ image


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_reading_for_both_products(dtype: torch.dtype) -> None:
    matrix = update(400, 320, spread=0.02)
    apart = krylov_factors(Matrix(matrix), 16, seeded(), float(matrix.square().sum()))
    operator = Passing(matrix.to(dtype))
    factors = krylov_factors(operator, 16, seeded(), float(matrix.square().sum()))
    assert 3 <= operator.readings <= 6
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(factors.singular, apart.singular, rtol=tolerance, atol=0)
    assert float((matrix - product(factors)).norm()) <= 1.002 * optimum(matrix, 16)
    check_orthonormal(factors, 1e-9 if dtype is torch.float64 else 2e-5)
    image, returned = round_trip(Matrix(matrix), matrix[:3].T)
    torch.testing.assert_close(image, matrix @ matrix[:3].T)
    torch.testing.assert_close(returned, matrix.T @ matrix @ matrix[:3].T)
