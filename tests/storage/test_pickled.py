from __future__ import annotations

import argparse
import collections
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import _TYPES

from dora_convert.core.tensors import DType, Pickled, TensorSpec
from dora_convert.errors import InputError
from dora_convert.storage import pickle_scan
from dora_convert.storage.dtypes import TORCH, from_torch
from dora_convert.storage.pickled import open_pickle, read_pickle_header

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def saved(tmp_path: Path, content: Any, **options: Any) -> Path:
    file = tmp_path / "adapter_model.bin"
    torch.save(content, file, **options)
    return file


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_tensors(tmp_path: Path, kind: Any, zipped: bool) -> None:
    file = saved(tmp_path, kind(TENSORS), _use_new_zipfile_serialization=zipped)
    read = open_pickle(file)
    assert list(read) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype is tensor.dtype
        assert torch.equal(read[name], tensor)


def test_header(tmp_path: Path) -> None:
    file = saved(tmp_path, TENSORS)
    refs = read_pickle_header(file)
    assert [ref.spec for ref in refs.values()] == [
        TensorSpec("a.weight", DType.F32, (2, 3)),
        TensorSpec("b", DType.BF16, (4,)),
    ]
    assert [ref.source for ref in refs.values()] == [Pickled(file, "a.weight"), Pickled(file, "b")]
    assert all(ref.stored == ref.spec and not ref.view for ref in refs.values())


def test_parameters_and_views(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    read = open_pickle(saved(tmp_path, {"p": torch.nn.Parameter(matrix), "t": matrix.T}))
    assert type(read["p"]) is torch.Tensor
    assert not read["p"].requires_grad
    assert torch.equal(read["t"], matrix.T)
    spec = read_pickle_header(tmp_path / "adapter_model.bin")["t"].spec
    assert spec.shape == (3, 2)


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare"])
def test_programs_are_not_run(tmp_path: Path, how: str) -> None:
    marker, file = tmp_path / "marker", tmp_path / "adapter_model.bin"
    content = {"a": Trap(marker)}
    if how == "bare":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(InputError, match="holds more than tensors") as caught:
        open_pickle(file)
    assert not marker.exists()
    message = caught.value.what + caught.value.hint
    assert "posix.system" in message
    assert "weights_only" not in message
    pickle.loads(pickle.dumps(content))  # it would have, otherwise
    assert marker.exists()


def test_foreign_objects(tmp_path: Path) -> None:
    file = saved(tmp_path, {"args": argparse.Namespace(x=1), **TENSORS})
    with pytest.raises(InputError, match=r"holds more than tensors \(argparse.Namespace\)"):
        open_pickle(file)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.ones(1)], "holds a list, not a dictionary"),
        (torch.ones(1), "holds a Tensor, not a dictionary"),
        (3, "holds a int, not a dictionary"),
    ],
)
def test_not_a_dictionary(tmp_path: Path, content: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        open_pickle(saved(tmp_path, content))


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz:Warning")
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_all_bad_entries_are_named(tmp_path: Path) -> None:
    content = {
        "good": torch.ones(1),
        "nested": {"w": torch.ones(1)},
        "step": 3,
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(1, device="meta"),
        "c128": torch.ones(1, dtype=torch.complex128),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        7: torch.ones(1),
        "a\nb": torch.ones(1),
    }
    with pytest.raises(InputError, match="is not a flat dictionary of plain tensors") as caught:
        open_pickle(saved(tmp_path, content))
    assert caught.value.problems == (
        '"nested" is a dict, not a tensor',
        '"step" is a int, not a tensor',
        '"sparse" is a sparse or nested tensor',
        '"meta" has no data (device meta)',
        '"c128" has an element type that is not supported (torch.complex128)',
        '"quantized" is a quantized tensor',
        'the key "7" is not a printable name',
        'the key "a\\nb" is not a printable name',
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"<html>", "is a web page"),
        (b"no pickle at all", "is damaged or not a torch pickle"),
        (b"\x80\x02", "is damaged or not a torch pickle"),
        (b"(\x96\4" + bytes(20), "is damaged or not a torch pickle"),  # with a bytearray
    ],
)
def test_no_pickle(tmp_path: Path, content: bytes, what: str) -> None:
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(content)
    with pytest.raises(InputError, match=what) as caught:
        open_pickle(file)
    assert caught.value.where == (str(file),)


def test_cut_anywhere(tmp_path: Path) -> None:
    whole = saved(tmp_path, TENSORS).read_bytes()
    for keep in range(1, len(whole), 41):
        file = tmp_path / "cut.bin"
        file.write_bytes(whole[:keep])
        with pytest.raises(InputError, match=r"cut\.bin is damaged"):
            open_pickle(file)


def test_broken_zip_directory(tmp_path: Path) -> None:
    file = saved(tmp_path, TENSORS)
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 2] = 0
    file.write_bytes(content)
    with pytest.raises(InputError, match="its zip directory cannot be read"):
        open_pickle(file)


def test_compressed_archive(tmp_path: Path) -> None:
    file = saved(tmp_path, TENSORS)
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(packed, "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="is a compressed archive"):
        open_pickle(packed)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        open_pickle(tmp_path)


def test_dtypes_are_those_of_safetensors() -> None:
    assert {
        dtype.label: native for dtype, native in TORCH.items() if dtype is not DType.F8_E8M0
    } == {label: native for label, native in _TYPES.items() if label not in ("F8_E8M0", "F4")}
    assert all(from_torch(native) is dtype for dtype, native in TORCH.items())
    assert all(native.itemsize * 8 == dtype.bits for dtype, native in TORCH.items())
    with pytest.raises(KeyError):
        from_torch(torch.complex128)


def zipped(tmp_path: Path, content: bytes) -> Path:
    """An archive as torch writes it, with this as its pickle."""
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    return file


def nested(levels: int) -> bytes:
    """A dictionary whose key is a tuple of twice a tuple of twice a tuple ..."""
    steps = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(levels))
    return b"\x80\x02X\x01\0\0\0x\x85q\x00" + steps + b"}h%cK\x01s." % levels


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        nested(60),  # 2**60 steps to hash
        nested(60).replace(b"\x85q\x00", b"0)q\x00"),  # from the empty tuple
        b"\x80\x02" + b"]" * 2001 + b".",
        b"\x80\x02" + b"\x8f" * 501 + b".",  # sets are large
        b"\x80\x02" + b"N0" * 2001 + b".",
    ],
    ids=["tuples", "empty tuples", "lists", "sets", "nothings"],
)
def test_what_would_take_for_ever_or_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, old: bool
) -> None:
    monkeypatch.setattr(pickle_scan, "_MOST_VALUES", 2000)
    file = zipped(tmp_path, content)
    if old:
        file.write_bytes(content)
    with pytest.raises(InputError, match="holds far more than a dictionary of tensors") as caught:
        open_pickle(file)
    assert caught.value.where == (str(file),)


def test_tuples_as_deep_as_may_be_are_keys_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a flat dictionary of plain tensors"):
        open_pickle(zipped(tmp_path, nested(7)))


def test_a_pickle_of_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_scan, "LARGEST", 1000)
    with pytest.raises(InputError, match="holds far more"):
        open_pickle(zipped(tmp_path, b"\x80\x02" + b"N0" * 500 + b"}."))


@pytest.mark.parametrize("zip_file", [True, False])
def test_tensors_that_claim_more_than_is_stored(tmp_path: Path, zip_file: bool) -> None:
    content = {"a": torch.ones(1).expand(10**6, 10**6), "b": torch.ones(2, 1).expand(2, 3)}
    file = saved(tmp_path, content, _use_new_zipfile_serialization=zip_file)
    with pytest.raises(InputError, match="is not a flat dictionary of plain tensors") as caught:
        open_pickle(file)
    assert caught.value.problems == (
        '"a" has 1000000000000 elements, more than are stored',
        '"b" has 6 elements, more than are stored',
    )


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((100,), (1,), 0),
        ((10**10,), (1,), 0),
        ((4,), (1,), 10**9),
        ((4,), (1,), -1),
        ((-4,), (1,), 0),
        ((4,), (-1,), 3),
        ((2**62, 2**62), (0, 0), 0),
    ],
)
@pytest.mark.parametrize("zip_file", [True, False])
def test_tensors_beyond_their_storage(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int, zip_file: bool
) -> None:
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
    )

    class Claimed:
        def __reduce__(self) -> Any:
            arguments = (storage, offset, size, stride, False, {})
            return torch._utils._rebuild_tensor_v2, arguments

    file = saved(tmp_path, {"w": Claimed()}, _use_new_zipfile_serialization=zip_file)
    with pytest.raises(InputError, match="is damaged or not a torch pickle"):
        open_pickle(file)


def test_no_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = saved(tmp_path, TENSORS)
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(open_pickle(file)) == list(TENSORS)


def test_archive_of_several_disks(tmp_path: Path) -> None:
    """Python's own question whether a file is an archive does not always have an answer."""
    file = saved(tmp_path, TENSORS)
    content = bytearray(file.read_bytes())
    locator = struct.pack("<4sLQL", b"PK\6\7", 1, 0, 7)
    end = content.rindex(b"PK\5\6")
    file.write_bytes(content[:end] + locator + content[end:])
    with pytest.raises(InputError, match="its zip directory cannot be read"):
        open_pickle(file)


def test_an_archive_behind_an_old_pickle(tmp_path: Path) -> None:
    """torch reads the first of the two, and so must what looks through it."""
    archive = saved(tmp_path, TENSORS).read_bytes()
    file = tmp_path / "both.bin"
    file.write_bytes(nested(60) + archive)
    assert zipfile.is_zipfile(file)
    with pytest.raises(InputError, match="holds far more than a dictionary of tensors"):
        open_pickle(file)
