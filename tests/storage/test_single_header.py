"""A finished file gets other text in its header."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_convert.errors import InputError
from dora_convert.storage.single import say_in_header


@pytest.mark.parametrize("metadata", [{"a": "é" * 1000}, {}])
def test_text_in_the_header(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).half(), "c": torch.arange(3)}
    save_file(tensors, file, metadata={"old": "text"})
    say_in_header(file, metadata)
    with safe_open(file, framework="pt") as opened:
        assert (opened.metadata() or {}) == metadata
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    expected = tmp_path / "y.safetensors"
    save_file(tensors, expected, metadata=metadata or None)
    assert file.read_bytes() == expected.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors"]


def test_no_safetensors_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(InputError):
        say_in_header(file, {})
    assert file.read_bytes() == b"nothing"
