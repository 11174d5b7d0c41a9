"""Magnitudes that are factors already, and biases that the trainer scaled: against float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Merge, Op, Piece, Plan, ScaleBias
from dora_convert.core.tensors import DType
from dora_convert.errors import MismatchError
from dora_convert.execution import units
from dora_convert.execution.lanes import Buffers
from dora_convert.execution.measure import figures, module_sums
from dora_convert.execution.run import run
from dora_convert.execution.update import open_update
from dora_convert.execution.verify import verify
from dora_convert.storage.reader import Reader

from .conftest import KINDS, Recorder, Store, exact, module, plan_of, written

AXES = pytest.mark.parametrize("axis", MagnitudeAxis)
ROWS, COLUMNS = 37, 53


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffers, "block_bytes", 1000)
    monkeypatch.setattr(units, "_UNIT_BYTES", 3000)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(axis: MagnitudeAxis) -> dict[str, Tensor]:
    length = ROWS if axis is MagnitudeAxis.OUT else COLUMNS
    return {
        "up": random(ROWS, 4, seed=1),
        "down": random(4, COLUMNS, seed=2),
        "m": random(length, seed=3).abs() + 0.5,
    }


def factor(weight: Tensor, tensors: dict[str, Tensor], axis: MagnitudeAxis) -> Tensor:
    """`m / ||V||` in float64."""
    dim = 1 if axis is MagnitudeAxis.OUT else 0
    v = weight.double() + 0.5 * tensors["up"].double() @ tensors["down"].double()
    return tensors["m"].double() / v.square().sum(dim=dim).sqrt()


def executed(plan: Plan, folder: Path, *, workers: int = 2) -> dict[str, Tensor]:
    run(plan, folder, workers=workers, listener=Recorder())
    checked = verify(plan, dict.fromkeys(written(folder), folder / "model.safetensors"), samples=4)
    assert not checked.differences
    return written(folder)


@AXES
@pytest.mark.parametrize("dtype", KINDS)
def test_factors_merge(
    tmp_path: Path, store: Store, axis: MagnitudeAxis, dtype: torch.dtype
) -> None:
    weight, tensors = random(ROWS, COLUMNS, seed=9).to(dtype), parts(axis)
    given = {**tensors, "m": factor(weight, tensors, axis).float()}
    base, refs = store(w=weight), store("adapter.safetensors", **given)
    layer = replace(module(refs, axis), magnitude_is=MagnitudeKind.FACTOR)
    op = Merge(base["w"], (Piece(0, ROWS, layer),))

    got = executed(plan_of({"w": (op, KINDS[dtype], (ROWS, COLUMNS))}), tmp_path)["w"]

    expected = exact(weight, **tensors, dim=1 if axis is MagnitudeAxis.OUT else 0)
    # The factors went through float32.
    assert torch.allclose(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@AXES
def test_factors_measured_and_projected(store: Store, axis: MagnitudeAxis) -> None:
    """Figures and updates are those of the norms that the factors stand for."""
    weight, tensors = random(ROWS, COLUMNS, seed=9), parts(axis)
    base = store(w=weight)
    norms = store("norms.safetensors", **tensors)
    given = {**tensors, "m": factor(weight, tensors, axis).float()}
    factors = store("factors.safetensors", **given)
    layers = [
        module(norms, axis),
        replace(module(factors, axis), magnitude_is=MagnitudeKind.FACTOR),
    ]
    seen = []
    for layer in layers:
        piece = Piece(0, ROWS, layer)
        plan = plan_of({"w": (Merge(base["w"], (piece,)), DType.F32, (ROWS, COLUMNS))})
        seen.append(figures([module_sums(plan, workers=1)["layer"]], "bfloat16"))
        with open_update(base["w"], piece, Reader(), Buffers()) as update:
            whole = update.times(torch.eye(COLUMNS))
            turned = update.transposed_times(torch.eye(ROWS)).T
        dim = 1 if axis is MagnitudeAxis.OUT else 0
        expected = exact(weight, **tensors, dim=dim) - weight.double()
        assert torch.allclose(whole.double(), expected, atol=1e-5)
        assert torch.allclose(turned.double(), expected, atol=1e-5)
        assert update.square == pytest.approx(float(expected.square().sum()), rel=1e-5)
    assert seen[0].magnitude_shift == pytest.approx(seen[1].magnitude_shift, rel=1e-5)
    assert seen[0].effect == pytest.approx(seen[1].effect, rel=1e-5)


def test_a_nan_row_under_factors_is_a_fault(tmp_path: Path, store: Store) -> None:
    weight, tensors = random(ROWS, COLUMNS, seed=9), parts(MagnitudeAxis.OUT)
    weight[5, 7] = torch.nan
    base, refs = store(w=weight), store("adapter.safetensors", **tensors)
    layer = replace(module(refs), magnitude_is=MagnitudeKind.FACTOR)
    plan = plan_of({"w": (Merge(base["w"], (Piece(0, ROWS, layer),)), DType.F32, weight.shape)})
    with pytest.raises(MismatchError, match="not defined"):
        run(plan, tmp_path, workers=1, listener=Recorder())


def scaled_bias(
    store: Store, kind: MagnitudeKind, *, flipped: bool, dtype: torch.dtype = torch.float32
) -> tuple[Plan, Tensor]:
    """A layer and its bias, the weight stored `[in, out]` if flipped; and the expected bias."""
    tensors = parts(MagnitudeAxis.OUT)
    weight, bias = random(ROWS, COLUMNS, seed=9).to(dtype), random(ROWS, seed=8).to(dtype)
    c = factor(weight, tensors, MagnitudeAxis.OUT)
    given = {**tensors, "m": c.float()} if kind is MagnitudeKind.FACTOR else tensors
    stored = weight.T.contiguous() if flipped else weight
    base, refs = store(w=stored, b=bias), store("adapter.safetensors", **given)
    layer: DoraModule = replace(module(refs), magnitude_is=kind)
    layer = layer.transposed() if flipped else layer
    pieces = (Piece(0, stored.shape[0], layer),)
    jobs: dict[str, tuple[Op, DType, tuple[int, ...]]] = {
        "b": (ScaleBias(base["b"], base["w"], pieces), KINDS[dtype], (ROWS,)),
        "w": (Merge(base["w"], pieces), KINDS[dtype], tuple(stored.shape)),
    }
    return plan_of(jobs), bias.double() * c


@pytest.mark.parametrize("kind", MagnitudeKind)
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
def test_scaled_bias(
    tmp_path: Path, store: Store, kind: MagnitudeKind, flipped: bool, dtype: torch.dtype
) -> None:
    plan, expected = scaled_bias(store, kind, flipped=flipped, dtype=dtype)
    got = executed(plan, tmp_path)["b"]
    assert got.dtype is dtype
    assert torch.allclose(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_scaled_bias_of_a_fused_layer(tmp_path: Path, store: Store) -> None:
    """Rows outside every piece keep their bias; the second piece starts inside its module."""
    tensors = parts(MagnitudeAxis.OUT)
    weight, bias = random(60, COLUMNS, seed=9), random(60, seed=8)
    rows = weight[10:30]
    own = {"up": tensors["up"][5:25], "down": tensors["down"], "m": tensors["m"][5:25]}
    base, refs = store(w=weight, b=bias), store("adapter.safetensors", **tensors)
    op = ScaleBias(base["b"], base["w"], (Piece(10, 30, module(refs), 5),))
    got = executed(plan_of({"b": (op, DType.F32, (60,))}), tmp_path)["b"]
    expected = bias.double()
    expected[10:30] *= factor(rows, own, MagnitudeAxis.OUT)
    assert torch.allclose(got.double(), expected, rtol=1e-6)


def test_verify_finds_a_wrong_bias(tmp_path: Path, store: Store) -> None:
    plan, _ = scaled_bias(store, MagnitudeKind.NORM, flipped=False)
    executed(plan, tmp_path)
    file = tmp_path / "model.safetensors"
    start = file.read_bytes().index(b"}", 8)  # the data begins where the header ends
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    assert start < size + 8
    data[size + 8 + 3] ^= 1  # the exponent of the first tensor's first value
    file.write_bytes(data)
    found = verify(plan, dict.fromkeys(["b", "w"], file), samples=None)
    assert len(found.differences) == 1
