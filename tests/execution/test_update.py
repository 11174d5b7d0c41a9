"""The effective update as an operator, against the dense one in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, MagnitudeKind
from dora_convert.core.plan import Piece
from dora_convert.core.tensors import TensorRef
from dora_convert.execution.lanes import Buffers
from dora_convert.execution.update import open_update
from dora_convert.storage.pickled import read_pickle_header
from dora_convert.storage.reader import Reader, RowBlocks

from .conftest import Store, check_update, exact, module, random

SHAPES = [(37, 23), (1, 9), (40, 1), (5, 60)]
OUT, IN = MagnitudeAxis.OUT, MagnitudeAxis.IN


def parts(rows: int, columns: int, axis: MagnitudeAxis) -> dict[str, Tensor]:
    length = rows if axis is OUT else columns
    return {
        "up": random(rows, 4, seed=1),
        "down": random(4, columns, seed=2),
        "m": random(length, seed=3).abs() + 0.5,
    }


@pytest.fixture(params=[(1, 0), (500, 1 << 20), (500, 0), (1 << 20, 1 << 20)], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single rows, several blocks, one block; read each time, or once and kept."""
    monkeypatch.setattr(Buffers, "block_bytes", request.param[0])
    monkeypatch.setattr(Buffers, "kept_bytes", request.param[1])


def compare(base: TensorRef, weight: Tensor, made: DoraModule, tensors: dict[str, Tensor]) -> None:
    dim = 1 if made.axis is OUT else 0
    merged = exact(weight, **tensors, dim=dim)
    low_rank = 0.5 * tensors["up"].double() @ tensors["down"].double()
    with open_update(base, Piece(0, len(weight), made), Reader(), Buffers()) as update:
        tolerance = 1e-12 if weight.dtype is torch.float32 else 2e-5
        check_update(update, merged - weight.double(), low_rank, tolerance)


@pytest.mark.parametrize("axis", MagnitudeAxis)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dora(
    store: Store, axis: MagnitudeAxis, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, tensors = random(*shape, seed=9, dtype=dtype), parts(*shape, axis)
    refs = store("adapter.safetensors", **tensors)
    compare(store(w=weight)["w"], weight, module(refs, axis), tensors)


def test_pickled_base(store: Store, tmp_path: Path) -> None:
    weight, tensors = random(12, 8, seed=9), parts(12, 8, IN)
    refs = store("adapter.safetensors", **tensors)
    torch.save({"w": weight}, tmp_path / "base.bin")
    base = read_pickle_header(tmp_path / "base.bin")["w"]
    compare(base, weight, module(refs, IN), tensors)


@pytest.mark.parametrize("axis", MagnitudeAxis)
def test_transposed_layers(store: Store, axis: MagnitudeAxis) -> None:
    """A module given for `[out, in]`, a weight that is stored `[in, out]`."""
    weight, tensors = random(12, 7, seed=9), parts(12, 7, axis)
    refs = store("adapter.safetensors", **tensors)
    made = module(refs, axis).transposed()
    base = store(w=weight.T.contiguous())["w"]
    dense = (exact(weight, **tensors, dim=1 if axis is OUT else 0) - weight.double()).T
    low_rank = 0.5 * (tensors["up"].double() @ tensors["down"].double()).T
    with open_update(base, Piece(0, 7, made), Reader(), Buffers()) as update:
        check_update(update, dense, low_rank, 1e-12)


@pytest.mark.parametrize("axis", MagnitudeAxis)
def test_plain_lora_does_not_look_at_the_weight(store: Store, axis: MagnitudeAxis) -> None:
    tensors = parts(20, 11, axis)
    refs = store("adapter.safetensors", **tensors)
    base = store(w=torch.full((20, 11), torch.nan))["w"]
    made = replace(module(refs, axis), magnitude=None)
    low_rank = 0.5 * tensors["up"].double() @ tensors["down"].double()
    with open_update(base, Piece(0, 20, made), Reader(), Buffers()) as update:
        check_update(update, low_rank, low_rank, 1e-12)


@pytest.mark.parametrize("axis", MagnitudeAxis)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_only(store: Store, axis: MagnitudeAxis, dtype: torch.dtype) -> None:
    weight = random(20, 11, seed=9, dtype=dtype)
    tensors = parts(20, 11, axis)
    refs = store("adapter.safetensors", **tensors)
    made = replace(module(refs, axis), delta=None)
    merged = exact(weight, **tensors, dim=1 if axis is OUT else 0, scaling=0.0)
    dense = merged - weight.double()
    with open_update(store(w=weight)["w"], Piece(0, 20, made), Reader(), Buffers()) as update:
        check_update(
            update, dense, torch.zeros_like(dense), 1e-12 if dtype is torch.float32 else 2e-5
        )


def test_no_change_at_all(store: Store) -> None:
    refs = store("adapter.safetensors", **parts(6, 5, OUT))
    made = replace(module(refs), delta=None, magnitude=None)
    base = store(w=random(6, 5))["w"]
    with open_update(base, Piece(0, 6, made), Reader(), Buffers()) as update:
        assert update.square == update.by_magnitude == 0
        assert not update.times(random(5, 2)).any()
        assert not update.transposed_times(random(6, 2)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_fused_tensor(store: Store, dtype: torch.dtype) -> None:
    """Rows 10:25 of the tensor are rows 5:20 of the module."""
    weight, tensors = random(30, 13, seed=9, dtype=dtype), parts(24, 13, OUT)
    refs = store("adapter.safetensors", **tensors)
    own = {"up": tensors["up"][5:20], "down": tensors["down"], "m": tensors["m"][5:20]}
    dense = exact(weight[10:25], **own) - weight[10:25].double()
    low_rank = 0.5 * own["up"].double() @ own["down"].double()
    piece = Piece(10, 25, module(refs), offset=5)
    with open_update(store(w=weight)["w"], piece, Reader(), Buffers()) as update:
        check_update(update, dense, low_rank, 1e-12 if dtype is torch.float32 else 2e-5)


def test_a_tiny_change_is_not_lost_in_the_weight(store: Store) -> None:
    """`W' - W` would cancel in the working type; `(c - 1) V + D` does not."""
    weight = random(64, 32, seed=9, dtype=torch.bfloat16)
    tensors = parts(64, 32, OUT)
    tensors["up"] *= 1e-6
    v = weight.double() + 0.5 * tensors["up"].double() @ tensors["down"].double()
    tensors["m"] = (v.norm(dim=1) * (1 + 1e-4 * random(64, seed=4))).float()
    refs = store("adapter.safetensors", **tensors)
    dense = exact(weight, **tensors) - weight.double()
    with open_update(store(w=weight)["w"], Piece(0, 64, module(refs)), Reader(), Buffers()) as up:
        x = random(32, 3, seed=7).double()
        assert float((up.times(x) - dense @ x).norm() / (dense @ x).norm()) < 1e-3
        assert up.square == pytest.approx(float(dense.square().sum()), rel=2e-3)


@pytest.mark.parametrize("axis", MagnitudeAxis)
def test_undefined_rows_are_counted(store: Store, axis: MagnitudeAxis) -> None:
    weight, tensors = random(8, 8), parts(8, 8, axis)
    if axis is IN:
        weight[:, 2], weight[0, 5] = 0, torch.inf
        tensors["down"][:, 2] = 0
    else:
        weight[2], weight[5, 0] = 0, torch.inf
        tensors["up"][2] = 0
    refs = store("adapter.safetensors", **tensors)
    piece = Piece(0, 8, module(refs, axis))
    with open_update(store(w=weight)["w"], piece, Reader(), Buffers()) as update:
        assert (update.faults.zero, update.faults.nonfinite) == (1, 1)


def test_a_zero_row_that_stays_zero(store: Store) -> None:
    weight, tensors = random(8, 6), parts(8, 6, OUT)
    weight[2], tensors["up"][2], tensors["m"][2] = 0, 0, 0
    refs = store("adapter.safetensors", **tensors)
    with open_update(store(w=weight)["w"], Piece(0, 8, module(refs)), Reader(), Buffers()) as up:
        assert not up.faults
        product = up.times(random(6, 2))
        assert not product[2].any()
        assert bool(torch.isfinite(product).all())


@pytest.mark.parametrize("axis", MagnitudeAxis)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_the_update_almost_cancels(
    store: Store, axis: MagnitudeAxis, dtype: torch.dtype
) -> None:
    """Of `w² + 2 w d + d²` nothing would be left but rounding."""
    weight, tensors = random(12, 12, seed=9, dtype=dtype), parts(12, 12, axis)
    tensors["up"][3], tensors["down"][:, 5] = 0, 0
    if axis is OUT:
        tensors["up"][3, 0] = -2
        tensors["down"][0] = weight[3].float() * (1 + 1e-4 * random(12, seed=4))
    else:
        tensors["down"][0, 5] = -2
        tensors["up"][:, 0] = weight[:, 5].float() * (1 + 1e-4 * random(12, seed=4))
    low_rank = 0.5 * tensors["up"].double() @ tensors["down"].double()
    norms = (weight.double() + low_rank).norm(dim=1 if axis is OUT else 0)
    assert float(norms.min()) < 1e-3 < 1e-1 * float(norms.median())
    refs = store("adapter.safetensors", **tensors)
    piece = Piece(0, 12, module(refs, axis))
    with open_update(store(w=weight)["w"], piece, Reader(), Buffers()) as update:
        rtol = 1e-6 if dtype is torch.float32 else 1e-3
        goal = tensors["m"].double() / norms
        torch.testing.assert_close(update.factor.double(), goal, rtol=rtol, atol=0)


def test_a_factor_needs_no_norms(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = parts(9, 7, OUT)
    refs = store("adapter.safetensors", **tensors)
    made = replace(module(refs), magnitude_is=MagnitudeKind.FACTOR)
    monkeypatch.setattr(RowBlocks, "read", lambda *_: pytest.fail("W was read"))
    with open_update(store(w=random(9, 7))["w"], Piece(0, 9, made), Reader(), Buffers()) as update:
        torch.testing.assert_close(update.factor, tensors["m"].double())


def test_a_small_weight_is_read_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, block: None
) -> None:
    refs = store("adapter.safetensors", **parts(30, 20, OUT))
    monkeypatch.setattr(Buffers, "kept_bytes", 30 * 20 * 4)
    monkeypatch.setattr(Buffers, "block_bytes", 500)
    base = store(w=random(30, 20))["w"]
    seen: list[int] = []
    read = RowBlocks.read

    def counted(self: RowBlocks, start: int, stop: int, buffer: Tensor) -> Tensor:
        seen.extend(range(start, stop))
        return read(self, start, stop, buffer)

    monkeypatch.setattr(RowBlocks, "read", counted)
    with open_update(base, Piece(0, 30, module(refs)), Reader(), Buffers()) as update:
        update.times(random(20, 2))
        update.transposed_times(random(30, 2))
        assert update.square > 0
    assert seen == list(range(30))
