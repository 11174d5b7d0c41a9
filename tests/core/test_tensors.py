from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.tensors import DType, Permuted, Reshaped, TensorSpec

from .values import dora, ref

WHOLE = [dtype for dtype in DType if dtype.bits >= 8]
TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def test_labels_and_sizes_are_those_of_safetensors() -> None:
    for label, dtype in TORCH.items():
        found = DType[label]
        assert found.label == label
        assert found.bits == 8 * dtype.itemsize
        assert f'"dtype":"{label}"'.encode() in save({"t": torch.zeros(2, dtype=dtype)})


def test_order_is_that_of_safetensors() -> None:
    """Its writer sorts by element type, the last of its enumeration first."""
    tensors = {label: torch.zeros(1, dtype=dtype) for label, dtype in TORCH.items()}
    header = save(tensors)[8:]
    offsets = {label: header.index(f'"{label}":'.encode()) for label in TORCH}
    written = sorted(TORCH, key=offsets.__getitem__)
    assert written == sorted(TORCH, key=lambda label: DType[label].order, reverse=True)


def test_weights_are_plain_floats() -> None:
    assert {d.label for d in DType if d.is_weight} == {"F16", "BF16", "F32", "F64"}


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.I8])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (5, 0)])
def test_bytes(dtype: DType, shape: tuple[int, ...]) -> None:
    spec = TensorSpec("t", dtype, shape)
    assert spec.numel == torch.empty(shape).numel()
    assert spec.nbytes == spec.numel * TORCH[dtype.label].itemsize


def test_elements_below_a_byte_are_packed() -> None:
    assert TensorSpec("t", DType.F4, (3, 4)).nbytes == 6


def test_transposing() -> None:
    plain = ref("w", 3, 5)
    turned = plain.transposed()
    assert turned.spec.shape == (5, 3)
    assert turned.stored == plain.stored
    assert turned.view == (Permuted((1, 0)),)
    assert not turned.is_contiguous
    assert turned.transposed().spec == plain.spec
    with pytest.raises(AssertionError):
        ref("w", 3, 5, 2).transposed()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_reshaping(shape: list[int]) -> None:
    plain = ref("w", *shape)
    rows = plain.reshaped(shape[0], math.prod(shape[1:]))
    assert rows.spec.numel == plain.spec.numel
    assert rows.is_contiguous
    assert rows.stored == plain.stored
    assert (rows.view == ()) == (len(shape) == 2)
    assert all(isinstance(step, Reshaped) for step in rows.view)
    with pytest.raises(AssertionError):
        plain.reshaped(plain.spec.numel + 1)


def test_renaming_leaves_the_stored_name() -> None:
    other = ref("w", 3).renamed("v")
    assert (other.spec.name, other.stored.name) == ("v", "w")


def test_a_transposed_module_is_the_same_update_of_the_other_orientation() -> None:
    module = dora("q", 6, 10)
    turned = module.transposed()
    assert module.delta is not None
    assert turned.delta is not None
    assert (module.delta.shape, turned.delta.shape) == ((6, 10), (10, 6))
    assert module.delta.rank == turned.delta.rank == 4
    assert turned.axis is MagnitudeAxis.IN
    # (up @ down).T = down.T @ up.T
    assert turned.delta.down.stored == module.delta.up.stored
    assert turned.delta.up.stored == module.delta.down.stored
    assert turned.magnitude == module.magnitude
    assert turned.transposed().axis is MagnitudeAxis.OUT
    assert [axis.flipped.flipped for axis in MagnitudeAxis] == list(MagnitudeAxis)
