"""A base model as it is given: a folder or file of one model, or a pipeline of diffusers.

A pipeline is a folder with `model_index.json` and a folder for each of its parts. Source: diffusers
0.42, `pipelines/pipeline_utils.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dora_convert.core.bundle import Checkpoint
from dora_convert.core.tensors import COMPONENT_MARK, TensorRef
from dora_convert.errors import InputError
from dora_convert.storage.checkpoint import carried_files, is_declared, open_checkpoint
from dora_convert.storage.documents import read_json
from dora_convert.storage.folders import leaves, list_files, require_inside
from dora_convert.storage.oserrors import reading

__all__ = ["PIPELINE", "open_model"]

PIPELINE = "model_index.json"


def open_model(path: Path, *, allow_pickle: bool = False, role: str = "base model") -> Checkpoint:
    """Read the headers and the config of what is at `path`.

    The tensors of a pipeline's models are called `unet::conv_in.weight`. Models that hold no dense
    safetensors go along as they are, and so does all else that lies beside. Raises InputError.
    """
    with reading(path):
        is_pipeline = (path / PIPELINE).is_file()
    if not is_pipeline:
        return open_checkpoint(path, allow_pickle=allow_pickle, role=role)
    require_inside(path, path / PIPELINE)
    tensors: dict[str, TensorRef] = {}
    shards: dict[str, str] = {}
    files = list(carried_files(path))
    for folder in _folders(path):
        part = _model(path / folder)
        if part is None:
            files += [f"{folder}/{name}" for name in _weights(path / folder, files)]
            continue
        for name, ref in part.tensors.items():
            full = f"{folder}{COMPONENT_MARK}{name}"
            tensors[full] = ref.renamed(full)
            shards[full] = f"{folder}/{part.shards[name]}"
    if not tensors:
        what = f"none of the models of {path.name or path} is stored in safetensors"
        raise InputError(what, where=str(path))
    return Checkpoint(path, tensors, shards, {}, tuple(sorted(files)))


def _folders(root: Path) -> list[str]:
    """Those of the pipeline's parts that are there, as its index names them."""
    index = read_json(root / PIPELINE)
    named = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    with reading(root):
        there = {entry.name for entry in root.iterdir() if entry.is_dir()}
        return [name for name in named if name in there and not leaves(root, root / name)]


def _model(folder: Path) -> Checkpoint | None:
    """One model, if it is one of dense safetensors; a tokenizer, say, is none."""
    with reading(folder):
        names = list_files(folder)
    if not any(name.endswith(".safetensors") for name in names):
        return None
    found = open_checkpoint(folder)
    return None if is_declared(found.config) else replace(found, files=())


def _weights(folder: Path, known: list[str]) -> list[str]:
    """Files of a model that is not read, whatever they are, but for those that go along anyway."""
    with reading(folder):
        names = list_files(folder)
    return [
        name
        for name in names
        if f"{folder.name}/{name}" not in known
        and not name.startswith(".")
        and not leaves(folder, folder / name)
    ]
