"""The largest files that are read at all, made to take as much memory as they can."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_convert.errors import InputError
from dora_convert.storage.documents import read_json
from dora_convert.storage.header import read_header

EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
ESCAPED = "\\ud83d\\ude00"  # makes a string of ASCII four times as large


def header(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


HEADERS: dict[str, Callable[[], str]] = {
    "names": lambda: "{" + ",".join(f'"{i:020d}":{EMPTY}' for i in range(300_000)) + "}",
    "metadata": lambda: '{"__metadata__":{"a":"' + "b" * 47_000_000 + ESCAPED + '"}}',
    "wide": lambda: '{"__metadata__":{"a":"' + "b" * 11_000_000 + '\N{GRINNING FACE}"}}',
    "spaces": lambda: "{" + " " * 47_000_000 + "}",
}
INDEXES: dict[str, Callable[[], str]] = {
    "names": lambda: "{" + ",".join(f'"{i:060d}":"{i:08d}"' for i in range(390_000)) + "}",
    "lists": lambda: '{"a":[' + "[]," * 190_000 + "[]]}",
    "text": lambda: '{"a":"' + "b" * 33_000_000 + ESCAPED + '"}',
    "wide": lambda: '{"a":"' + "b" * 8_000_000 + '\N{GRINNING FACE}"}',
}


def check(read: Callable[[], object]) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(InputError):
            read()
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADERS)
def test_headers(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(header(HEADERS[kind]()))
    check(lambda: read_header(file))


@pytest.mark.slow
@pytest.mark.parametrize("kind", INDEXES)
def test_indexes(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(INDEXES[kind]())
    check(lambda: read_json(file, limit=32 << 20))
