"""Which files of a repository an adapter or a base model is read from."""

from __future__ import annotations

from collections.abc import Sequence

from dora_convert.core.globs import matches_any
from dora_convert.errors import InputError
from dora_convert.storage.checkpoint import is_carried, without_variants
from dora_convert.storage.pipeline import PIPELINE
from dora_convert.storage.weights import GGUF, PICKLES, shard_stem

__all__ = ["adapter_files", "base_files"]

_TENSORS = ".safetensors"
_INDEX = ".safetensors.index.json"
_USUAL = ("adapter_model", "adapters", "pytorch_lora_weights")
_USUAL_PICKLES = ("adapter_model", "non_lora_trainables")


def adapter_files(
    names: Sequence[str], globs: Sequence[str] = (), *, file: str | None = None
) -> list[str]:
    """Weights, and the small files beside them. `globs` are the weights of a described format.

    `file`: the weights, where they are given by name.
    """
    if file is not None:
        return _one_file(file, names)
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


def base_files(names: Sequence[str], *, file: str | None = None) -> list[str]:
    """The weights in one of the layouts that there are, and what is carried along with them.

    Pickles only where there are no safetensors, GGUF where there is nothing else, other runtimes'
    copies never. `file`: the weights, where they are given by name. Raises InputError where several
    GGUF models are there to choose from.
    """
    if file is not None:
        return _one_file(file, names)
    if PIPELINE in names:
        return _with(_of_pipeline(names), [name for name in names if is_carried(name)])
    top = [n for n in names if "/" not in n and not n.startswith(("adapter", "consolidated"))]
    pickles = (*PICKLES, ".index.json")
    weights = (
        _tensors(top)
        or [name for name in top if name.startswith("pytorch_model") and name.endswith(pickles)]
        or _gguf(top)
    )
    return _with(weights, [name for name in names if is_carried(name)])


def _of_pipeline(names: Sequence[str]) -> list[str]:
    """The weights of every part, in the folder of its name; what lies beside them is a copy."""
    parts: dict[str, list[str]] = {}
    for name in names:
        folder, slash, file = name.partition("/")
        if slash and "/" not in file:
            parts.setdefault(folder, []).append(file)
    return [
        f"{folder}/{file}"
        for folder, files in parts.items()
        for file in _tensors(without_variants(files))
        or [file for file in files if file.endswith(PICKLES)]
    ]


def _one_file(file: str, beside: Sequence[str]) -> list[str]:
    """A file that is given by its name, and of those beside it the documents that it needs.

    A GGUF file comes with its other parts, and with all that a model's folder is carried along for.
    """
    documents = [name for name in beside if name.endswith(".json")]
    if not file.endswith(GGUF):
        return _with([file], documents)
    stem = shard_stem(file)
    parts = [name for name in beside if stem is not None and shard_stem(name) == stem]
    return _with([file, *parts], documents + [name for name in beside if is_carried(name)])


def _tensors(top: Sequence[str]) -> list[str]:
    indexes = [name for name in top if name.endswith(_INDEX)]
    single = "model" + _TENSORS
    if single in top and "model" + _INDEX not in top:
        return [single]
    for index in sorted(indexes, key=lambda name: name != "model" + _INDEX):
        stem = index.removesuffix(_INDEX)
        return [index, *(n for n in top if n.startswith(f"{stem}-") and n.endswith(_TENSORS))]
    return [name for name in top if name.endswith(_TENSORS)]


def _gguf(top: Sequence[str]) -> list[str]:
    """The one model that there is, before all of them are fetched."""
    found = sorted(name for name in top if name.endswith(GGUF))
    if len({shard_stem(name) or name for name in found}) > 1:
        raise InputError(
            f"{len(found)} GGUF files may be the base model",
            problems=found,
            hint="Name one of them: hf://ORG/NAME/FILE.gguf",
        )
    return found


def _with(weights: list[str], others: list[str]) -> list[str]:
    return sorted({*weights, *others})
