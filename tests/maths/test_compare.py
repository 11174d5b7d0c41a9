"""Figures against their definitions, computed with numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import torch

from dora_convert.maths.compare import ModuleSums, block_sums


def test_sums_follow_their_definitions() -> None:
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(6, 9)), rng.normal(size=(6, 9))
    m = rng.uniform(0.5, 2, size=6)
    merged = m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
    rounded = torch.from_numpy(merged).bfloat16().double().numpy()
    norms = np.linalg.norm(w, axis=1)
    cosine = (w * v).sum(axis=1) / norms / np.linalg.norm(v, axis=1)

    sums = block_sums(torch.from_numpy(w), torch.from_numpy(v), torch.from_numpy(m), torch.bfloat16)

    assert sums.rows == 6
    assert math.isclose(sums.base, (w**2).sum())
    assert math.isclose(sums.update, ((v - w) ** 2).sum())
    assert math.isclose(sums.effect, ((merged - w) ** 2).sum())
    assert math.isclose(sums.noise, ((rounded - merged) ** 2).sum(), rel_tol=1e-6)
    assert math.isclose(sums.kept, ((rounded - w) * (merged - w)).sum())
    assert math.isclose(sums.magnitude_shift, np.abs(m - norms).sum())
    assert math.isclose(sums.magnitude_base, norms.sum())
    assert math.isclose(sums.direction_shift, (1 - cosine).sum())
    assert math.isclose(sums.ratio, np.log(m / norms).sum())
    assert math.isclose(sums.ratio_square, (np.log(m / norms) ** 2).sum())


def test_blocks_add_up_and_zero_rows_do_not_count() -> None:
    w = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    m = torch.tensor([2.0, 0.0, 2.0], dtype=torch.float64)
    whole = block_sums(w, w.clone(), m, torch.bfloat16)
    parts = ModuleSums()
    for i in range(3):
        parts.add(block_sums(w[i : i + 1], w[i : i + 1].clone(), m[i : i + 1], torch.bfloat16))
    assert parts == whole
    assert whole.rows == 2
    assert whole.effect == 1.0
    assert whole.noise == 0.0


def test_plain_lora_has_no_magnitude_of_its_own() -> None:
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    v = torch.tensor([[6.0, 8.0]], dtype=torch.float64)
    sums = block_sums(w, v, None, torch.bfloat16)
    assert sums.effect == 25.0
    assert math.isclose(sums.ratio, math.log(2))
