from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import save_file

from dora_convert.errors import InputError
from dora_convert.storage.checkpoint import open_checkpoint

Save: TypeAlias = Callable[..., Path]
Write: TypeAlias = Callable[..., Path]

INDEX = "model.safetensors.index.json"
ONE, TWO, THREE = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a file of small tensors, by safetensors' own writer."""

    def save(name: str, *tensors: str, value: float = 1.0) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: torch.full((2, 3), value) for key in tensors or ("w",)}, file)
        return file

    return save


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a text, or a value as JSON."""

    def write(name: str, content: str | bytes | Mapping[str, Any]) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


@pytest.fixture
def sharded(tmp_path: Path, save: Save, write: Write) -> Path:
    """A base in three shards, with an index and a config."""
    save(ONE, "a", "b")
    save(TWO, "c")
    save(THREE, "d")
    write(INDEX, {"metadata": {}, "weight_map": {"a": ONE, "b": ONE, "c": TWO, "d": THREE}})
    write("config.json", {"model_type": "llama"})
    return tmp_path


def faults(path: Path, **options: Any) -> list[str]:
    """What opening a base complains of."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, **options)
    error = caught.value
    assert error.where
    return list(error.problems) or [error.what]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, which root may mount."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def raw(text: str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    body = text.encode() if isinstance(text, str) else text
    return len(body).to_bytes(8, "little") + body + data


def put(tmp_path: Path, content: bytes) -> Path:
    """Write it; returns where."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    return file
