"""Which files of a repository an adapter or a base model is read from."""

from __future__ import annotations

from collections.abc import Sequence

from dora_convert.core.globs import matches_any
from dora_convert.storage.checkpoint import is_carried
from dora_convert.storage.weights import PICKLES

__all__ = ["adapter_files", "base_files"]

_TENSORS = ".safetensors"
_INDEX = ".safetensors.index.json"
_USUAL = ("adapter_model", "adapters", "pytorch_lora_weights")
_USUAL_PICKLES = ("adapter_model", "non_lora_trainables")


def adapter_files(names: Sequence[str], globs: Sequence[str] = ()) -> list[str]:
    """Weights, and the small files beside them. `globs` are the weights of a described format."""
    top = [name for name in names if "/" not in name]
    tensors = [name for name in top if name.endswith((_TENSORS, _INDEX))]
    pickles = [name for name in top if name.endswith(PICKLES)]
    weights = (
        [name for name in top if matches_any(name, globs)]
        or [name for name in tensors if name.startswith(_USUAL)]
        or tensors
        or [name for name in pickles if name.startswith(_USUAL_PICKLES)]
        or pickles
    )
    return _with(weights, [n for n in top if is_carried(n) or n.endswith("config.json")])


def base_files(names: Sequence[str]) -> list[str]:
    """The weights in one of the layouts that there are, and what is carried along with them.

    Pickles only where there are no safetensors, other runtimes' copies never.
    """
    top = [n for n in names if "/" not in n and not n.startswith(("adapter", "consolidated"))]
    weights = _tensors(top) or [
        name
        for name in top
        if name.startswith("pytorch_model") and name.endswith((*PICKLES, ".index.json"))
    ]
    return _with(weights, [name for name in names if is_carried(name)])


def _tensors(top: Sequence[str]) -> list[str]:
    indexes = [name for name in top if name.endswith(_INDEX)]
    single = "model" + _TENSORS
    if single in top and "model" + _INDEX not in top:
        return [single]
    for index in sorted(indexes, key=lambda name: name != "model" + _INDEX):
        stem = index.removesuffix(_INDEX)
        return [index, *(n for n in top if n.startswith(f"{stem}-") and n.endswith(_TENSORS))]
    return [name for name in top if name.endswith(_TENSORS)]


def _with(weights: list[str], others: list[str]) -> list[str]:
    return sorted({*weights, *others})
