from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

from dora_convert.core.tensors import DType, Slice, TensorRef, TensorSpec
from dora_convert.errors import InputError
from dora_convert.storage import header
from dora_convert.storage.header import read_header, read_metadata

from .conftest import put, raw

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refused(tmp_path: Path, content: bytes) -> InputError:
    file = put(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert caught.value.where == (str(file),)
    assert caught.value.what.startswith("x.safetensors ")
    assert caught.value.what.isprintable()
    assert caught.value.hint
    return caught.value


# ---------------------------------------------------------------------------------- reading


def test_reads_literal_bytes(tmp_path: Path) -> None:
    text = (
        '{"b":{"dtype":"BF16","shape":[1,3],"data_offsets":[4,10]},'
        '"__metadata__":{"format":"pt"},'
        '"a":{"data_offsets":[0,4],"shape":[],"dtype":"F32"}}  '
    )
    file = put(tmp_path, raw(text, bytes(10)))
    start = 8 + len(text)
    b, a = TensorSpec("b", DType.BF16, (1, 3)), TensorSpec("a", DType.F32, ())
    assert read_header(file) == {
        "b": TensorRef(spec=b, source=Slice(file, start + 4), stored=b),
        "a": TensorRef(spec=a, source=Slice(file, start), stored=a),
    }
    assert list(read_header(file)) == ["b", "a"]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{ }",
        '{"__metadata__":{}}',
        '{"__metadata__":null}',  # as mlx writes it
        '{"__metadata__":{"a":"\\u00e9{},:","b":""}}',
        '{\t"__metadata__" :\n{ "a" : "b" , "c" : "d" } }\r\n',
    ],
)
def test_no_tensors(tmp_path: Path, text: str) -> None:
    assert read_header(put(tmp_path, raw(text))) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", {}),
        ('{"__metadata__": null}', {}),
        ('{"__metadata__": {}}', {}),
        ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"__metadata__":{"k":"v\\u00e9"}}',
         {"k": "vé"}),
    ],
)  # fmt: skip
def test_metadata(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw(text))
    assert read_metadata(file) == expected


def test_white_space_and_escapes(tmp_path: Path) -> None:
    text = '{ "\\u0061/\\"}" : { "dtype" : "U8" ,\n"shape" : [ 1 ] , "data_offsets" : [0,1] } }'
    assert list(read_header(put(tmp_path, raw(text, b"x")))) == ['a/"}']


def test_packed_and_empty_tensors(tmp_path: Path) -> None:
    text = json.dumps(
        {
            "four": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
            "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [3, 6]},
            "none": {"dtype": "F64", "shape": [0, 5], "data_offsets": [3, 3]},
        }
    )
    refs = read_header(put(tmp_path, raw(text, bytes(6))))
    assert [ref.spec.nbytes for ref in refs.values()] == [3, 3, 0]


def test_follows_links(tmp_path: Path) -> None:
    file = put(tmp_path, raw("{}"))
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert read_header(link) == {}


# ------------------------------------------------------------------------------ no such file


@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (b"", "is empty", "Download it again"),
        (b"abc", "is too short for a safetensors file: 3 bytes", "again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer", "lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page", "login"),
        (b"\n <html><body>", "is a web page", "login"),
        (b"\xef\xbb\xbf<html>", "is a web page", "login"),
        (b'{"error":"Repository not found"}', "is not a safetensors file", "right file"),
        (b"PK\x03\x04\x14\0\0\0" + bytes(20), "is not a safetensors file", "right file"),
        (b"\x1f\x8b\x08\0" + bytes(20), "is truncated: its header takes 559903 bytes", "again"),
        ((48_000_001).to_bytes(8, "little"), "more than the 48000000 allowed", "again"),
        (bytes(8), "give a header of 0 bytes", "right file"),
        ((100_000_001).to_bytes(8, "little"), "a header of 100000001 bytes", "right file"),
        ((2**64 - 1).to_bytes(8, "little"), "a header of 18446744073709551615", "right file"),
        ((3).to_bytes(8, "little") + b"{}", "its header takes 3 bytes and 2 are there", "again"),
    ],
)
def test_impostors(tmp_path: Path, content: bytes, what: str, hint: str) -> None:
    error = refused(tmp_path, content)
    assert what in error.what
    assert hint in error.hint


def test_folder_pipe_device_and_absence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, what in [
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a device, pipe or socket"),
        (Path("/dev/zero"), "is a device, pipe or socket"),
        (tmp_path / "absent", "it does not exist"),
        (tmp_path / ("x" * 300), "its name is too long"),
    ]:
        with pytest.raises(InputError, match=what):
            read_header(path)


def test_file_that_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path, raw("{}"))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, n, at) if at == 0 else b"")
    with pytest.raises(InputError, match="became shorter while it was read"):
        read_header(file)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path, raw('{"__metadata__":{"a":"b"}}'))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 3) if at else n, at))
    assert read_header(file) == {}


# ------------------------------------------------------------------------------ broken headers


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'{"a\xff":{}}', "it is not UTF-8"),
        ("[]", "not a JSON object"),
        (" {}", "not a JSON object"),
        ("{", "it is not JSON"),
        ("{]", "it is not JSON"),
        ('{"a"', ": is missing"),
        ('{"a" {}}', ": is missing"),
        ('{"a":{}', "must give dtype"),
        ("{'a':1}", "is missing"),
        ('{"a', "it is not JSON"),
        ('{"a\n":{}}', "it is not JSON"),
        ('{"\\ud800":{}}', "it is not JSON"),
        ("{}x", "characters follow its end at character 2"),
        ("{}\0\0", "characters follow its end"),
        ('{"__metadata__":{}}{}', "characters follow its end"),
        ('{"__metadata__":[]}', "must map strings to strings"),
        ('{"__metadata__":{"a":1}}', "must map strings to strings"),
        ('{"__metadata__":{"a":{"b":"c"}}}', "must map strings to strings"),
        ('{"__metadata__":{"a":"b"', "is missing"),
        ('{"__metadata__":{"a":"\\ud800"}}', "it is not JSON"),
        ('{"__metadata__":{"a":"b","a":"b"}}', 'names "a" twice in its header\'s __metadata__'),
        ('{"__metadata__":{},"__metadata__":{}}', 'names "__metadata__" twice'),
        ('{"__metadata__":{} "a":{}}', ", is missing"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "dtype, shape and data_offsets are not"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "dtype, shape and data_offsets are not there"),
        ('{"a":{"b":' + "[" * 1900 + "]}}", "it is not JSON"),
        ('{"a":1}', "dtype, shape and data_offsets are not there"),
        ('{"a":null}', "dtype, shape and data_offsets are not there"),
        ('{"a":{}}', "must give dtype, shape and data_offsets"),
    ],
)
def test_broken_json(tmp_path: Path, text: str | bytes, what: str) -> None:
    assert what in refused(tmp_path, raw(text)).what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ('"dtype":"F32","shape":[2]', "must give dtype, shape and data_offsets"),
        ('"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1', "and nothing else"),
        ('"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]', "once"),
        ('"dtype":"F32","dtype":"F32","shape":[2]', "once"),
        ('"dtype":"F31","shape":[2],"data_offsets":[0,8]', 'dtype "F31" is not known'),
        ('"dtype":"f32","shape":[2],"data_offsets":[0,8]', 'dtype "f32" is not known'),
        ('"dtype":32,"shape":[2],"data_offsets":[0,8]', 'dtype "32" is not known'),
        ('"dtype":["F32"],"shape":[2],"data_offsets":[0,8]', "is not known"),
        ('"dtype":"F32","shape":2,"data_offsets":[0,8]', "its shape must be"),
        ('"dtype":"F32","shape":[true,2],"data_offsets":[0,8]', "its shape must be"),
        ('"dtype":"F32","shape":["2"],"data_offsets":[0,8]', "its shape must be"),
        ('"dtype":"F32","shape":[null],"data_offsets":[0,8]', "its shape must be"),
        ('"dtype":"F32","shape":[[2]],"data_offsets":[0,8]', "its shape must be"),
        (f'"dtype":"F32","shape":{[1] * 16 + [2]},"data_offsets":[0,8]', "at most 16"),
        ('"dtype":"F32","shape":[2],"data_offsets":[0]', "must be two whole numbers"),
        ('"dtype":"F32","shape":[2],"data_offsets":[0,8,8]', "must be two whole numbers"),
        ('"dtype":"F32","shape":[2],"data_offsets":[false,8]', "must be two whole numbers"),
        ('"dtype":"F32","shape":[2],"data_offsets":{"a":1}', "it is not JSON"),
        ('"dtype":"F32","shape":[-2],"data_offsets":[0,8]', "a number in it is not a whole one"),
        ('"dtype":"F32","shape":[-0],"data_offsets":[0,0]', "a number in it is not a whole one"),
        ('"dtype":"F32","shape":[2.0],"data_offsets":[0,8]', "a number in it is not a whole one"),
        ('"dtype":"F32","shape":[2e0],"data_offsets":[0,8]', "a number in it is not a whole one"),
        ('"dtype":"F32","shape":[NaN],"data_offsets":[0,8]', "a number in it is not a whole one"),
        ('"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]', "is not a whole one"),
        (f'"dtype":"F32","shape":[{2**64}],"data_offsets":[0,8]', "is not a whole one"),
        (f'"dtype":"F32","shape":[{"9" * 1000}],"data_offsets":[0,8]', "is not a whole one"),
        (f'"dtype":"F32","shape":{[2**62] * 2},"data_offsets":[0,8]', "is too large"),
        (f'"dtype":"F32","shape":[0,{2**62},2],"data_offsets":[0,0]', "is too large"),
        (f'"dtype":"F32","shape":{[2**31] * 2 + [2, 0]},"data_offsets":[0,0]', "is too large"),
        ('"dtype":"F32","shape":[3],"data_offsets":[0,8]', "takes 12 bytes"),
        ('"dtype":"F32","shape":[2],"data_offsets":[8,0]', "8 to 0 span -8"),
        ('"dtype":"F4","shape":[3],"data_offsets":[0,1]', "3 elements of F4 are no whole bytes"),
        ('"dtype":"F6_E3M2","shape":[2],"data_offsets":[0,1]', "are no whole bytes"),
        (f'"dtype":"{"F" * 3000}","shape":[2],"data_offsets":[0,8]', "are not there"),
        (f'"dtype":"{"F" * 1000}","shape":[2],"data_offsets":[0,8]', 'FFF..." is not known'),
    ],
)
def test_broken_entries_are_named(tmp_path: Path, change: str, what: str) -> None:
    error = refused(tmp_path, raw('{"a.weight":{' + change + "}}", bytes(8)))
    assert 'at tensor "a.weight": ' in error.what
    assert what in error.what
    assert len(error.what) < 500


@pytest.mark.parametrize("name", ["", "a\0", "a\x1b[31m", "a\u202eb", "\x7f", "a\nb", "\u2028"])
def test_names_that_cannot_be_shown(tmp_path: Path, name: str) -> None:
    assert "empty or unprintable" in refused(tmp_path, raw(json.dumps({name: GOOD}), bytes(8))).what


def test_duplicate_tensor(tmp_path: Path) -> None:
    entry = json.dumps(GOOD)
    error = refused(tmp_path, raw(f'{{"a":{entry},"a":{entry}}}', bytes(8)))
    assert 'names "a" twice' in error.what


@pytest.mark.parametrize(
    ("offsets", "nbytes", "what"),
    [
        ([(0, 8), (4, 12)], 12, 'another overlaps tensor "t1"'),
        ([(0, 8), (0, 8)], 8, 'another overlaps tensor "t1"'),
        ([(0, 8), (9, 17)], 17, '1 unused bytes lie before tensor "t1"'),
        ([(9, 17), (0, 8)], 17, '1 unused bytes lie before tensor "t0"'),
        ([(1, 9)], 9, '1 unused bytes lie before tensor "t0"'),
        ([(0, 8)], 5, "is truncated: 3 bytes are missing"),
        ([(0, 8)], 9, "is damaged: 1 bytes too many"),
        ([], 1, "is damaged: 1 bytes too many"),
    ],
)
def test_cover(tmp_path: Path, offsets: list[tuple[int, int]], nbytes: int, what: str) -> None:
    body = {
        f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": pair}
        for i, pair in enumerate(offsets)
    }
    assert what in refused(tmp_path, raw(json.dumps(body), bytes(nbytes))).what


def test_counts_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_MAX_TENSORS", 2)
    monkeypatch.setattr(header, "_MAX_METADATA", 2)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for body, what in [
        ({f"t{i}": empty for i in range(3)}, "more than 2 tensors"),
        ({"__metadata__": {f"t{i}": "" for i in range(3)}}, "more than 2 entries"),
        ({"t" * 1001: empty}, "a name of more than 1000 characters"),
        ({"\N{GRINNING FACE}" * 1001: empty}, "a name of more than 1000 characters"),
    ]:
        assert what in refused(tmp_path, raw(json.dumps(body))).what


def test_longest_name_and_a_tensor_that_is_called_metadata(tmp_path: Path) -> None:
    longest = "\N{GRINNING FACE}" * 1000
    assert list(read_header(put(tmp_path, raw(json.dumps({longest: GOOD}), bytes(8))))) == [longest]
    text = json.dumps({"__metadata__": GOOD, "a": GOOD})
    assert "must map strings to strings" in refused(tmp_path, raw(text, bytes(8))).what


def test_a_long_header_must_be_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_MAX_LENGTH", 400)
    for char, fits in [("x", True), ("\u00e9", False)]:
        file = put(
            tmp_path, raw(json.dumps({"__metadata__": {char: "y" * 200}}, ensure_ascii=False))
        )
        if fits:
            assert read_header(file) == {}
        else:
            with pytest.raises(InputError, match="too long for one that is not ASCII"):
                read_header(file)


def test_needs_no_torch() -> None:
    code = (
        "import sys; from dora_convert.storage import bundle, checkpoint, header, staging; "
        "sys.exit('torch' in sys.modules)"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0


def test_strings_end_where_json_says(tmp_path: Path) -> None:
    """In every Python: the expressions of some took the one that is cut off here for whole."""
    pieces = ['"', "\\", "u", "d", "8", "a", "é", "n", "\x01", "\\ud83d", "\\ude00", "\\u00e9"]
    choose = random.Random(1)
    names = ["".join(choose.choices(pieces, k=choose.randrange(1, 7))) for _ in range(3000)]
    taken = 0
    for name in ["b\\u00e9\\ud8", *names]:
        entry = f'{{"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}'
        try:
            (parsed,) = json.loads(entry)
            parsed.encode()
            expected = [parsed] if parsed and parsed.isprintable() else None
        except ValueError:
            expected = None
        file = tmp_path / "x.safetensors"
        file.write_bytes(len(entry.encode()).to_bytes(8, "little") + entry.encode())
        try:
            found = list(read_header(file))
        except InputError:
            found = None
        assert found == expected, entry
        taken += found is not None
    assert 100 < taken < 2900
