"""Plans over small random files, and the float64 results that they must give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis
from dora_convert.core.deltas import LowRank
from dora_convert.core.plan import Job, Op, Plan, Shard
from dora_convert.core.tensors import DType, TensorRef, TensorSpec
from dora_convert.execution.update import Update
from dora_convert.storage.header import read_header

KINDS = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}

Store = Callable[..., dict[str, TensorRef]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Save tensors as safetensors; returns their references."""

    def save(file: str = "base.safetensors", **tensors: Tensor) -> dict[str, TensorRef]:
        save_file(tensors, tmp_path / file)
        return read_header(tmp_path / file)

    return save


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(rows: int, columns: int, axis: MagnitudeAxis) -> dict[str, Tensor]:
    """An adapter of rank 4 for a weight of this shape, as `exact` and `module` take it."""
    length = rows if axis is MagnitudeAxis.OUT else columns
    return {
        "up": random(rows, 4, seed=1),
        "down": random(4, columns, seed=2),
        "m": random(length, seed=3).abs() + 0.5,
    }


def module(
    refs: dict[str, TensorRef], axis: MagnitudeAxis = MagnitudeAxis.OUT, scaling: float = 0.5
) -> DoraModule:
    """A module from the references `up`, `down` and `m`."""
    return DoraModule("layer", LowRank(refs["down"], refs["up"]), refs.get("m"), axis, scaling)


def exact(
    w: Tensor, up: Tensor, down: Tensor, m: Tensor, *, dim: int = 1, scaling: float = 0.5
) -> Tensor:
    """The paper's formula in float64; `dim` is the axis that the norm runs over."""
    v = w.double() + scaling * up.double() @ down.double()
    return m.double().unsqueeze(dim) * v / v.square().sum(dim=dim, keepdim=True).sqrt()


def plan_of(jobs: dict[str, tuple[Op, DType, tuple[int, ...]]]) -> Plan:
    """One shard with these tensors."""
    made = tuple(
        Job(op, TensorSpec(name, dtype, shape)) for name, (op, dtype, shape) in jobs.items()
    )
    return Plan((Shard("model.safetensors", made),), ())


def written(folder: Path) -> dict[str, Tensor]:
    """What safetensors' own reader finds."""
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


class Recorder:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.total = 0
        self.files: list[str] = []

    def started(self, nbytes: int) -> None:
        self.total = nbytes

    def advanced(self, nbytes: int) -> None:
        self.nbytes += nbytes

    def sealed(self, file: str) -> None:
        self.files.append(file)


def near(got: Tensor, goal: Tensor, tolerance: float) -> None:
    assert got.shape == goal.shape
    assert float((got.double() - goal).norm()) <= tolerance * float(goal.norm())


def check_update(update: Update, change: Tensor, delta: Tensor, tolerance: float) -> None:
    """`change` is T and `delta` is D, both dense."""
    rows, columns = change.shape
    assert update.shape == (rows, columns)
    x, y = random(columns, 3, seed=7).double(), random(rows, 3, seed=8).double()
    image, returned = update.round_trip(x)
    for got, goal in (
        (update.times(x), change @ x),
        (update.transposed_times(y), change.T @ y),
        (image, change @ x),
        (returned, change.T @ change @ x),
        (update.row_squares, change.square().sum(dim=1)),
        (update.column_squares, change.square().sum(dim=0)),
    ):
        near(got, goal, tolerance)
    assert update.square == pytest.approx(float(change.square().sum()), rel=tolerance)
    dropped = float((change - delta).square().sum())
    assert update.by_magnitude == pytest.approx(dropped, rel=tolerance)
    assert not update.faults
