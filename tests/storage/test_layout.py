from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dora_convert.core.tensors import DType, Slice, TensorSpec
from dora_convert.errors import InputError
from dora_convert.storage.header import layout, read_header

from .conftest import put

TORCH_TYPES = {
    DType.BOOL: torch.bool,
    DType.U8: torch.uint8,
    DType.I8: torch.int8,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E8M0: torch.float8_e8m0fnu,
    DType.F8_E4M3FNUZ: torch.float8_e4m3fnuz,
    DType.F8_E5M2FNUZ: torch.float8_e5m2fnuz,
    DType.I16: torch.int16,
    DType.U16: torch.uint16,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I32: torch.int32,
    DType.U32: torch.uint32,
    DType.F32: torch.float32,
    DType.C64: torch.complex64,
    DType.F64: torch.float64,
    DType.I64: torch.int64,
    DType.U64: torch.uint64,
}


def test_layout_literal() -> None:
    plan = layout([TensorSpec("b", DType.F16, (1, 2)), TensorSpec("a", DType.F32, ())])
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F16","shape":[1,2],"data_offsets":[4,8]}}'
    )
    text += b" " * (-len(text) % 8)
    assert plan.head == len(text).to_bytes(8, "little") + text
    assert dict(plan.starts) == {"a": len(plan.head), "b": len(plan.head) + 4}
    assert plan.size == len(plan.head) + 8


def assemble(tensors: dict[str, torch.Tensor], specs: list[TensorSpec], **options: Any) -> bytes:
    plan = layout(specs, **options)
    content = bytearray(plan.size)
    content[: len(plan.head)] = plan.head
    for name, start in plan.starts.items():
        data = tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        content[start : start + len(data)] = data
    return bytes(content)


def test_every_dtype_as_safetensors_writes_it(tmp_path: Path) -> None:
    tensors, specs = {}, []
    for i, (dtype, native) in enumerate(TORCH_TYPES.items()):
        for name in (f"z.{i}", f"a.{i}"):
            data = torch.arange(8 * native.itemsize, dtype=torch.uint8) % 2
            tensors[name] = data.view(native).reshape(2, 4)
            specs.append(TensorSpec(name, dtype, (2, 4)))
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    expected = (tmp_path / "x.safetensors").read_bytes()
    assert assemble(tensors, specs) == expected
    assert assemble(tensors, specs[::-1]) == expected
    read = read_header(tmp_path / "x.safetensors")
    assert {ref.spec for ref in read.values()} == set(specs)
    starts = layout(specs).starts
    assert {name: ref.source for name, ref in read.items()} == {
        name: Slice(tmp_path / "x.safetensors", start) for name, start in starts.items()
    }


@pytest.mark.parametrize("metadata", [{}, {"a": 'q"\\\x01\x7f\n\u00e9\U0001f600/'}])
def test_metadata_as_safetensors_writes_it(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {"w": torch.ones(3)}
    save_file(tensors, file, metadata=metadata or None)
    specs = [TensorSpec("w", DType.F32, (3,))]
    assert assemble(tensors, specs, metadata=metadata) == file.read_bytes()


def test_metadata_is_sorted() -> None:
    head = layout([], {"b": "1", "a": "2"}).head
    assert head[8:] == b'{"__metadata__":{"a":"2","b":"1"}}      '
    assert layout([], {"a": "2", "b": "1"}).head == head


# -------------------------------------------------------------------------------- hypothesis

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    str.isprintable
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
stores = st.dictionaries(
    names.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(TORCH_TYPES, key=lambda dtype: dtype.order)), shapes),
    max_size=6,
)
several = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@several
@given(store=stores)
def test_round_trip(tmp_path: Path, store: dict[str, tuple[DType, tuple[int, ...]]]) -> None:
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in store.items()]
    tensors = {spec.name: torch.zeros(spec.shape, dtype=TORCH_TYPES[spec.dtype]) for spec in specs}
    plan = layout(specs)
    file = put(tmp_path, plan.head + bytes(plan.size - len(plan.head)))
    assert {ref.spec for ref in read_header(file).values()} == set(specs)
    save_file(tensors, tmp_path / "y.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "y.safetensors").read_bytes() == file.read_bytes()


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes, digits or pieces of its header replaced."""
    body = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "c": {"dtype": "U8", "shape": [0], "data_offsets": [22, 22]},
    }
    text = json.dumps(body, separators=(",", ":")).encode()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text) - 1))
        width = draw(st.sampled_from([0, 1, 1, 1, 2, 6]))
        piece = draw(
            st.one_of(
                st.binary(max_size=2),
                st.sampled_from([b"0", b"1", b"6", b" ", b'"', b"}", b",", b"-", b"null", b"1e1"]),
                st.sampled_from([b"{", b"[", b"]", b"a", b"\\u0061", b'"a":1,', b"true", b"F16"]),
            )
        )
        text = text[:at] + piece + text[at + width :]
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1, -8, 2**40]))
    data = bytes(22 + draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1])))
    return length.to_bytes(8, "little") + text + data


def by_safetensors(file: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        with safe_open(file, "pt", backend="pread") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except SafetensorError:
        return None


@several
@given(content=mutants())
def test_never_laxer_than_safetensors(tmp_path: Path, content: bytes) -> None:
    file = put(tmp_path, content)
    try:
        refs = read_header(file)
    except InputError:
        return
    ours = {name: (ref.spec.dtype.label, list(ref.spec.shape)) for name, ref in refs.items()}
    assert ours == by_safetensors(file)
