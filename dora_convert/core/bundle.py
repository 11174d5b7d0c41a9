"""A folder of tensors and JSON documents, read as data; and the base checkpoint on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_convert.core.tensors import TensorRef

__all__ = ["Bundle", "Checkpoint", "Json"]

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An adapter folder: its tensors by stored name and its parsed JSON documents by file name."""

    root: Path
    tensors: Mapping[str, TensorRef]
    documents: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model: tensors by disk name, the shard of each, its config and its other files.

    `shards` maps a tensor's name to the file that holds it. `files` are the paths, relative to
    `root`, of all that is carried over beside the weights.
    """

    root: Path
    tensors: Mapping[str, TensorRef]
    shards: Mapping[str, str]
    config: Json
    files: tuple[str, ...] = ()
