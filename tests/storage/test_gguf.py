"""Heads of GGUF files: read as gguf's own reader does, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dora_convert.core.tensors import DType
from dora_convert.errors import InputError
from dora_convert.storage.gguf import read_gguf


def written(file: Path, *, alignment: int = 32) -> Path:
    """A file with fields of every kind."""
    writer = GGUFWriter(file, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "größe")
    writer.add_token_list([f"<{i}>" for i in range(3000)])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.flags", [True, False])
    for add, value in (
        (writer.add_uint8, 1), (writer.add_int8, -1), (writer.add_uint16, 1),
        (writer.add_int16, -1), (writer.add_int32, -1), (writer.add_uint64, 1),
        (writer.add_int64, -1), (writer.add_float32, 0.5), (writer.add_float64, 0.5),
        (writer.add_bool, True),
    ):  # fmt: skip
        add(f"one.{add.__name__}", value)
    writer.add_tensor("a.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b.weight", np.arange(4, dtype=np.float16))
    writer.add_tensor("c.weight", np.zeros((2, 5, 68), np.uint8), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_as_another_reader(alignment: int, tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf", alignment=alignment)
    got = read_gguf(file)
    theirs = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert got.tensors.keys() == theirs.keys() == {"a.weight", "b.weight", "c.weight"}
    for name, ref in got.tensors.items():
        assert ref.span[1] == theirs[name].data_offset
        assert ref.spec.nbytes == theirs[name].n_bytes
        assert ref.spec.shape == theirs[name].data.shape
        assert got.types[name] == theirs[name].tensor_type
    assert [ref.spec.dtype for ref in got.tensors.values()] == [DType.F32, DType.F16, DType.U8]
    assert got.texts == {"general.architecture": "llama", "general.name": "größe"}


# ------------------------------------------------------------------------ by hand, to be wrong


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(
    name: bytes = b"a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def head(
    *tensors: bytes, fields: tuple[bytes, ...] = (), version: int = 3, count: int | None = None
) -> bytes:
    numbers = (version, len(tensors) if count is None else count, len(fields))
    return b"GGUF" + struct.pack("<IQQ", *numbers) + b"".join((*fields, *tensors))


def refused(folder: Path, content: bytes) -> InputError:
    file = folder / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_gguf(file)
    return caught.value


def test_by_hand_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    data = head(tensor(), tensor(b"b", (2, 2), 1, 32))
    file.write_bytes(data + bytes(-len(data) % 32) + bytes(40))
    assert [ref.spec.shape for ref in read_gguf(file).tensors.values()] == [(4,), (2, 2)]


ALIGNED = text(b"general.alignment") + struct.pack("<II", 4, 33)
ENDLESS = text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60)
LONG = text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60)
NESTED = text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6
STRANGE = text(b"a") + struct.pack("<I", 77)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(60), "is not a GGUF file"),
        (head(version=1), "version 0x1"),
        (head(version=3 << 24), "version 0x3000000"),
        (head(count=1 << 40), "claims to hold"),
        (head(tensor(), count=2), "is truncated"),
        (head(tensor()), "is truncated"),
        (head(tensor(kind=4)) + bytes(64), "type 4, which gguf does not know"),
        (head(tensor(kind=9999)) + bytes(64), "type 9999"),
        (head(tensor(shape=())) + bytes(64), "0 axes"),
        (head(tensor(shape=(1,) * 5)) + bytes(64), "5 axes"),
        (head(tensor(shape=(0,))) + bytes(64), "the shape [0]"),
        (head(tensor(shape=(1 << 62, 1 << 62))) + bytes(64), "the shape"),
        (head(tensor(shape=(33,), kind=8)) + bytes(64), "in blocks of 32"),
        (head(tensor(offset=1 << 62)) + bytes(64), "is truncated"),
        (head(tensor(), tensor(offset=64)) + bytes(128), "holds \"a\" twice"),
        (head(tensor(), tensor(b"b", offset=8)) + bytes(128), "the same bytes"),
        (head(tensor(b"\xff")) + bytes(64), "that is no text"),
        (head(tensor(b"")) + bytes(64), "unusable name"),
        (head(tensor(b"a\nb")) + bytes(64), "unusable name"),
        (head(tensor(b"a" * 2000)) + bytes(64), "a text of 2000 bytes"),
        (head(fields=(ALIGNED,)) + bytes(64), "to 33 bytes"),
        (head(fields=(ENDLESS,)) + bytes(64), "a list of"),
        (head(fields=(LONG,)) + bytes(64), "is truncated"),
        (head(fields=(NESTED,)) + bytes(64), "unknown type in its head: 9"),
        (head(fields=(STRANGE,)) + bytes(64), "unknown type in its head: 77"),
    ],
)  # fmt: skip
def test_refused(content: bytes, words: str, tmp_path: Path) -> None:
    error = refused(tmp_path, content)
    assert words in error.what
    assert error.where


def test_cut_anywhere(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.gguf").read_bytes()
    ends = [*range(1, 200), *range(200, len(whole), 997), len(whole) - 340 - 30]
    for end in ends:
        assert refused(tmp_path, whole[:end]).what


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 330), value=st.integers(0, 255))
def test_any_byte_changed(place: int, value: int, tmp_path: Path) -> None:
    data = head(
        tensor(), tensor(b"b", (32, 2), 8, 32), fields=(text(b"k") + struct.pack("<IIQ", 9, 5, 2)
        + bytes(8), text(b"t") + struct.pack("<I", 8) + text(b"words")),
    )  # fmt: skip
    content = bytearray(data + bytes(-len(data) % 32) + bytes(32 + 68))
    content[place % len(content)] = value
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    try:
        got = read_gguf(file)
    except InputError:
        return
    assert all(ref.span[2] <= len(content) for ref in got.tensors.values())
