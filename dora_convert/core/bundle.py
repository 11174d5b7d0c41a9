"""A folder of tensors and JSON documents, read as data; and the base checkpoint on top of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_convert.core.tensors import TensorRef

__all__ = ["Bundle", "Checkpoint", "Json", "json_text"]

Json = Mapping[str, Any]


def json_text(document: Json) -> str:
    """A document as a person reads it; in ASCII if it holds what UTF-8 cannot, half a pair."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    return text if _is_unicode(text) else json.dumps(document, indent=2) + "\n"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Bundle:
    """An adapter folder: its tensors by stored name and its parsed JSON documents by file name.

    `scalars` are the values of tensors with one finite number, such as a module's alpha, which a
    format needs before it can say anything. `metadata` is the text in the headers of the files.
    """

    root: Path
    tensors: Mapping[str, TensorRef]
    documents: Mapping[str, Json] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model: tensors by disk name, the shard of each, its config and its other files.

    `shards` maps a tensor's name to the file that holds it. `files` are the paths, relative to
    `root`, of all that is carried over beside the weights. `schemes` are the quantisations that its
    weights lie in, where they are seen as the dense ones that they stand for.
    """

    root: Path
    tensors: Mapping[str, TensorRef]
    shards: Mapping[str, str]
    config: Json
    files: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
