"""The largest singular triples of an operator against full decompositions in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dora_convert.maths.krylov import krylov_factors, spans_everything
from dora_convert.maths.lowrank import round_trip
from tests.maths.operators import (
    Matrix,
    check_orthonormal,
    normal,
    optimum,
    product,
    seeded,
    update,
)


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
    round_trips: int = 0

    def times(self, x: Tensor) -> Tensor:
        self.readings += 1
        return super().times(x)

    def transposed_times(self, y: Tensor) -> Tensor:
        raise AssertionError("one reading would have done")

    def round_trip(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image = self.times(x)
        self.round_trips += 1
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


def test_the_outputs_so_far_where_they_hold_enough() -> None:
    """In single precision, of a spectrum as DoRA's: a few large values and the bulk of a weight."""
    matrix = update(900, 700, spread=0.02, rank=16)
    operator = Passing(matrix.float())
    factors = krylov_factors(operator, 48, seeded(), float(matrix.square().sum()))
    # The last product was one with both, so that nothing was lost of what it said.
    assert operator.round_trips == operator.readings
    missed = float((matrix - product(factors)).norm())
    assert missed <= 1.002 * optimum(matrix, 48)
    told = float((matrix.square().sum() - factors.singular.square().sum()).sqrt())
    assert told == pytest.approx(missed, rel=1e-4)
    check_orthonormal(factors, 2e-5)


@pytest.mark.parametrize("known", [4, 12, 40])
def test_likely_inputs_save_products(known: int) -> None:
    values = torch.where(known >= INDEX, 1.0, 0.02).double()
    square, inputs = float(values.square().sum()), torch.eye(600, dtype=torch.float64)[:, :known]
    without, given = Counted(values), Counted(values)
    krylov_factors(without, 12, seeded(), square)
    factors = krylov_factors(given, 12, seeded(), square, inputs[:, torch.arange(known).flip(0)])
    assert given.columns <= without.columns
    best = float(values[12:].norm())
    assert float((torch.diag(values) - product(factors)).norm()) <= 1.002 * best


def test_likely_inputs_that_are_nothing() -> None:
    matrix = update(400, 320, spread=0.02)
    square = float(matrix.square().sum())
    for likely in (torch.zeros(320, 5), torch.zeros(320, 0), torch.ones(320, 9)):
        factors = krylov_factors(Matrix(matrix), 16, seeded(), square, likely)
        assert float((matrix - product(factors)).norm()) <= 1.002 * optimum(matrix, 16)
