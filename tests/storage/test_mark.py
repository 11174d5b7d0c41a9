"""The mark of a base: the same for the same tensors, another for a change wherever it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.mark import checkpoint_mark


def mark(folder: Path, **files: dict[str, Tensor]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = {"model": "model.safetensors"} if len(files) == 1 else {}
    places = {}
    for file, tensors in files.items():
        name = names.get(file, f"{file}.safetensors")
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        text = str({"weight_map": places}).replace("'", '"')
        (folder / "model.safetensors.index.json").write_text(text)
    return checkpoint_mark(open_checkpoint(folder))


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(300, 64, generator=generator),
        "b": torch.randn(7, generator=generator),
    }


def test_files_make_no_difference(tmp_path: Path) -> None:
    both = tensors()
    one = mark(tmp_path / "one", model=both)
    assert mark(tmp_path / "two", x={"b": both["b"]}, y={"a": both["a"]}) == one


@pytest.mark.parametrize("start", [0, 40, 130, 220, 280])
def test_rows_that_were_trained(tmp_path: Path, start: int) -> None:
    """Any twentieth of a tensor that is other."""
    changed = tensors()
    changed["a"][start : start + 20] += 0.01
    assert mark(tmp_path / "new", model=changed) != mark(tmp_path / "old", model=tensors())


def test_small_tensors_count_whole(tmp_path: Path) -> None:
    changed = tensors()
    changed["b"][4] += 0.01
    assert mark(tmp_path / "new", model=changed) != mark(tmp_path / "old", model=tensors())
    other = {"a": tensors()["a"], "c": tensors()["b"]}
    assert mark(tmp_path / "other", model=other) != mark(tmp_path / "again", model=tensors())
