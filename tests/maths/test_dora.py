"""The kernels against the paper's formula, written out in float64 with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_convert.maths.dora import (
    RowFaults,
    column_factors,
    overflows,
    scale_rows,
    square_sums,
)


def formula(w: np.ndarray, d: np.ndarray, m: np.ndarray, *, axis: int) -> np.ndarray:
    """`m * V / ||V||` with the norm along `axis`."""
    v = w + d
    return np.expand_dims(m, axis) * v / np.sqrt((v * v).sum(axis=axis, keepdims=True))


sizes = st.integers(1, 40)


@settings(deadline=None, max_examples=40)
@given(rows=sizes, columns=sizes, rank=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_rows_and_columns_follow_the_paper(rows: int, columns: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns))
    up, down = rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))
    by_row, by_column = rng.normal(size=rows), rng.normal(size=columns)

    block = torch.from_numpy(w + 0.5 * up @ down)
    direction = block.clone()
    assert not scale_rows(block, torch.from_numpy(by_row))
    np.testing.assert_allclose(
        block.numpy(), formula(w, 0.5 * up @ down, by_row, axis=1), rtol=1e-9, atol=1e-12
    )

    factors, faults = column_factors(torch.from_numpy(by_column), square_sums(direction.clone()))
    assert not faults
    np.testing.assert_allclose(
        (direction * factors).numpy(),
        formula(w, 0.5 * up @ down, by_column, axis=0),
        rtol=1e-9,
        atol=1e-12,
    )


def test_a_column_gets_the_factor_of_its_channel() -> None:
    v = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4, 3, 3)))
    m = torch.tensor([2.0, 0.0, 1.0, 3.0])
    v[:, 1] = 0
    factors, faults = column_factors(m, square_sums(v.flatten(1).clone()))
    norms = v.square().sum(dim=(0, 2, 3), keepdim=True).sqrt()
    expected = m.view(1, 4, 1, 1) * v / norms.clamp_min(1e-9)
    torch.testing.assert_close(v.flatten(1) * factors, expected.flatten(1))
    assert not faults
    assert column_factors(m + 1, v.flatten(1).square().sum(dim=0))[1] == RowFaults(zero=1)


def test_a_zero_row_stays_zero_and_is_a_fault_only_with_a_magnitude() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    faults = scale_rows(rows, torch.tensor([0.0, 10.0, 2.0]))
    assert rows.tolist() == [[0.0, 0.0], [6.0, 8.0], [0.0, 0.0]]
    assert faults == RowFaults(zero=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_counted(value: float) -> None:
    rows = torch.tensor([[value, 1.0], [3.0, 4.0]])
    assert scale_rows(rows, torch.tensor([1.0, 5.0])) == RowFaults(nonfinite=1)
    assert rows[1].tolist() == [3.0, 4.0]


def test_zero_columns_are_counted() -> None:
    factors, faults = column_factors(
        torch.tensor([1.0, 0.0, 6.0]), torch.tensor([0.0, 0.0, 9.0], dtype=torch.float64)
    )
    assert factors.tolist() == [0.0, 0.0, 2.0]
    assert faults == RowFaults(zero=1)


def test_overflow_counts_what_became_infinite_only() -> None:
    exact = torch.tensor([1.0, 70000.0, float("inf"), -1e9])
    assert overflows(exact, exact.half()) == RowFaults(overflow=2)
    assert not overflows(exact, exact.bfloat16())
    assert not overflows(exact[:1], exact[:1].half())


def test_faults_add_up() -> None:
    total = RowFaults(zero=1) + RowFaults(nonfinite=2) + RowFaults(overflow=3)
    assert total == RowFaults(1, 2, 3)
    assert total
    assert not RowFaults()
