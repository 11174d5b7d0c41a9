"""Figures of whole modules, block by block, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.plan import Merge, Piece
from dora_convert.core.tensors import DType
from dora_convert.execution import measure
from dora_convert.execution.measure import figures, module_sums, storage_label

from .conftest import Store, module, plan_of


@pytest.mark.parametrize("axis", MagnitudeAxis)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures(
    store: Store, monkeypatch: pytest.MonkeyPatch, axis: MagnitudeAxis, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(measure, "_BLOCK", 500)
    monkeypatch.setattr(measure, "_PANEL", 4000)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=generator).to(dtype)
    up, down = torch.randn(40, 3, generator=generator), torch.randn(3, 24, generator=generator)
    norm_axis = 1 if axis is MagnitudeAxis.OUT else 0
    w = weight.double().numpy()
    norms = np.linalg.norm(w, axis=norm_axis)
    m = torch.from_numpy(norms * np.linspace(0.9, 1.2, len(norms))).float()
    refs = store("adapter.safetensors", up=up, down=down, m=m)
    op = Merge(store(w=weight)["w"], (Piece(0, 40, module(refs, axis)),))
    kind = DType.F32 if dtype is torch.float32 else DType.BF16
    plan = plan_of({"w": (op, kind, (40, 24))})

    sums = module_sums(plan, workers=2)
    found = figures([sums["layer"]], storage_label(plan))

    v = w + 0.5 * up.double().numpy() @ down.double().numpy()
    lengths = np.linalg.norm(v, axis=norm_axis, keepdims=True)
    scale = np.expand_dims(m.double().numpy(), norm_axis)
    effect = scale * v / lengths - w
    rounded = torch.from_numpy(effect + w).bfloat16().double().numpy() - w
    logs = np.log(m.double().numpy() / norms)
    cosine = (w * v).sum(axis=norm_axis) / norms / lengths.squeeze()
    size = np.linalg.norm
    expected = {
        "update": size(v - w) / size(w),
        "effect": size(effect) / size(w),
        "magnitude_shift": np.abs(m.double().numpy() - norms).mean() / norms.mean(),
        "magnitude_bias": logs.mean(),
        "magnitude_spread": logs.std(),
        "direction_shift": (1 - cosine).mean(),
        "rounding_loss": size(rounded - effect) / size(effect),
        "kept": (rounded * effect).sum() / (effect * effect).sum(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-3), name
    assert found.stored_as == "bfloat16"


def test_no_module_no_figures() -> None:
    nothing = figures([], "bfloat16")
    assert nothing.update == nothing.kept == nothing.magnitude_spread == 0.0
