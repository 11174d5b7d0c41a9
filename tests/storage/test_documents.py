from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from dora_convert.errors import InputError
from dora_convert.storage.documents import read_json

Write: TypeAlias = Callable[..., Path]


def test_object(write: Write) -> None:
    file = write("a.json", '{"r": 8, "x": [1, 2.5, null, true, "\\u00e9é"], "d": {"r": 1}}\n')
    assert read_json(file) == {"r": 8, "x": [1, 2.5, None, True, "éé"], "d": {"r": 1}}


def test_numbers_that_json_does_not_have_are_left_to_the_caller(write: Write) -> None:
    value = read_json(write("a.json", '{"a": NaN, "b": -Infinity, "c": 1e999}'))
    assert math.isnan(value["a"])
    assert value["b"] == -math.inf
    assert value["c"] == math.inf


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "c.json is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "c.json is a git-lfs pointer"),
        (b"<!doctype html>", "c.json is a web page"),
        (b"{", "c.json is not valid JSON: .* \\(line 1\\)"),
        (b'{\n"a": 1,\n}', "c.json is not valid JSON: .* \\(line 3\\)"),
        (b"{} {}", "c.json is not valid JSON: Extra data"),
        (b'\xef\xbb\xbf{"a": 1}', "c.json is not valid JSON"),
        (b'{"a": "\xff"}', "c.json is not UTF-8"),
        (b'{"a": 1, "a": 1}', 'c.json gives the key "a" twice'),
        (b'{"x": [{"b": 1, "a\\n": 1, "a\\n": 2}]}', r'gives the key "a\\n" twice'),
        (b"[]", "c.json must hold a JSON object"),
        (b"null", "c.json must hold a JSON object"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "c.json is nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "c.json is nested too deeply"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "c.json is nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "a number is too long"),
    ],
)
def test_refused(write: Write, content: bytes, what: str) -> None:
    file = write("c.json", content)
    with pytest.raises(InputError, match=what) as caught:
        read_json(file)
    assert caught.value.where == (str(file),)


def test_size_is_checked_before_reading(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("c.json", {"a": "b"})
    size = file.stat().st_size
    assert read_json(file, limit=size) == {"a": "b"}
    sparse = write("sparse.json", "{")
    os.truncate(sparse, (4 << 20) + 1)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 64), at))
    for path, limit in [(file, {"limit": size - 1}), (sparse, {})]:
        with pytest.raises(InputError, match="is too large for such a document"):
            read_json(path, **limit)


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"c\.json cannot be read: it does not exist"):
        read_json(tmp_path / "c.json")


def test_as_deep_as_may_be(write: Write) -> None:
    assert read_json(write("c.json", b'{"a":' * 99 + b"1" + b"}" * 99))


@pytest.mark.parametrize(
    ("content", "limit", "what"),
    [
        ('{"a":[' + "[]," * 400_000 + "1]}", 4 << 20, "holds more than 400000 values"),
        ('{"a":[' + "0," * 400_001 + "1]}", 4 << 20, "holds more than 400000 values"),
        ('{"a":"' + "x" * (8 << 20) + '\N{GRINNING FACE}"}', 32 << 20, "not ASCII: 8388620 bytes"),
        ('{"a":"' + "x" * (8 << 20) + '\\u00e9"}', 32 << 20, "not ASCII: 8388622 bytes"),
    ],
    ids=["lists", "numbers", "wide", "escaped"],
)
def test_what_would_take_much_memory(write: Write, content: str, limit: int, what: str) -> None:
    with pytest.raises(InputError, match=what):
        read_json(write("c.json", content), limit=limit)
