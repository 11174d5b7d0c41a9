"""What is seen in the data before anything is written."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_convert.core.adapter import Adapter, DoraModule, MagnitudeAxis, TokenRows
from dora_convert.core.plan import Merge, Piece, Plan
from dora_convert.core.tensors import DType
from dora_convert.execution import probe
from dora_convert.execution.probe import copy_differences, fingerprint, nonfinite
from dora_convert.storage.reader import Reader

from .conftest import Store, module, plan_of


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def uneven() -> Tensor:
    """A weight whose rows differ in length, as those of trained models do."""
    return random(64, 32, seed=1) * torch.linspace(0.5, 2, 64).unsqueeze(1)


def plan_for(store: Store, weight: Tensor, magnitude: Tensor) -> Plan:
    refs = store("adapter.safetensors", up=random(64, 2), down=random(2, 32, seed=2), m=magnitude)
    base = store(w=weight)["w"]
    return plan_of({"w": (Merge(base, (Piece(0, 64, module(refs)),)), DType.F32, (64, 32))})


def test_magnitudes_that_sit_on_the_base(store: Store, uneven: Tensor) -> None:
    norms = uneven.norm(dim=1) * (1 + 0.03 * random(64, seed=3))
    found = fingerprint(plan_for(store, uneven, norms), Reader(), workers=2)
    assert found is not None
    assert found.rows == 32
    assert found.deviation < 0.05
    assert found.correlation > 0.9
    assert not found.is_doubtful


def test_magnitudes_of_another_base(store: Store, uneven: Tensor) -> None:
    other = random(64, 32, seed=4) * torch.rand(64, 1, generator=torch.Generator().manual_seed(5))
    found = fingerprint(plan_for(store, uneven, other.norm(dim=1)), Reader(), workers=1)
    assert found is not None
    assert found.is_doubtful


def test_nothing_to_compare(store: Store, uneven: Tensor) -> None:
    plan = plan_for(store, uneven, uneven.norm(dim=1))
    op = plan.jobs[0].op
    assert isinstance(op, Merge)
    inward = replace(op.pieces[0].module, axis=MagnitudeAxis.IN)
    only = plan_of({"w": (Merge(op.base, (Piece(0, 64, inward),)), DType.F32, (64, 32))})
    assert fingerprint(only, Reader(), workers=1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_with_nan_or_infinity_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(probe, "_BLOCK", 64)  # several blocks a tensor
    up, down, m = random(64, 2), random(2, 32), random(64)
    up[63, 1], m[3], m[60] = math.nan, math.inf, -math.inf
    tensors = {"up": up, "down": down, "m": m, "saved": random(5), "rows": random(2, 4)}
    refs = store(**{name: tensor.to(dtype) for name, tensor in tensors.items()})
    adapter = Adapter(
        "peft",
        {"layer": module(refs)},
        replaced={"saved": refs["saved"]},
        token_rows={"e": TokenRows((0, 1), refs["rows"])},
    )
    assert nonfinite(adapter, Reader(), workers=2) == [
        "m: 2 of 64 values are NaN or Inf",
        "up: 1 of 128 values are NaN or Inf",
    ]


def test_large_but_finite_half_precision_values_pass(store: Store) -> None:
    refs = store(up=torch.full((64, 2), 60000.0).half(), down=random(2, 32), m=random(64))
    assert nonfinite(Adapter("peft", {"layer": module(refs)}), Reader(), workers=1) == []


def test_a_copy_of_the_base_is_compared(store: Store, tmp_path: Path) -> None:
    weight = random(50, 8)
    base = {"a": store(w=weight)["w"], "b": store("b.safetensors", w=weight)["w"]}
    other = weight.clone()
    other[-1] += 1
    grown = torch.cat([weight, random(3, 8)])
    copies = store("copies.safetensors", same=weight.bfloat16(), other=other, grown=grown)

    def carrying(path: str, name: str) -> DoraModule:
        return DoraModule(path, None, None, MagnitudeAxis.OUT, 1.0, copies[name])

    assert copy_differences([carrying("a", "same")], base, Reader()) == []
    assert copy_differences([carrying("a", "grown")], base, Reader()) == []
    assert copy_differences([carrying("b", "other")], base, Reader()) == ["b"]
    assert copy_differences([carrying("elsewhere", "other")], base, Reader()) == []
