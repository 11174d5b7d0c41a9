"""An adapter: a folder or a file, read as data."""

from __future__ import annotations

from pathlib import Path

from dora_convert.core.bundle import Bundle, Json
from dora_convert.errors import InputError
from dora_convert.storage.documents import read_json
from dora_convert.storage.folders import contents, list_files, require_inside, require_path
from dora_convert.storage.oserrors import reading
from dora_convert.storage.weights import (
    PICKLES,
    Weights,
    raise_faults,
    read_indexed,
    read_weights,
    refuse_pickle,
    some,
)

__all__ = ["open_bundle"]

_INDEX = "adapter_model.safetensors.index.json"
# PEFT and torchtune, mlx-lm (which leaves numbered checkpoints beside it), diffusers.
_USUAL = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
_USUAL_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_CONFIG = "adapter_config.json"
_CONFIG_LIMIT = 1 << 20


def open_bundle(path: Path, *, allow_pickle: bool = False) -> Bundle:
    """Read the headers and the JSON documents of the adapter at `path`."""
    require_path(path, "adapter")
    with reading(path):
        root = path if path.is_dir() else path.parent
        names = list_files(root)
        file = _choose(root, names) if path.is_dir() else path.name
    if file != _INDEX and not file.endswith((".safetensors", *PICKLES)):
        raise InputError(
            f"{file} is neither a safetensors file nor a torch pickle", where=str(path)
        )
    if Path(file).suffix in PICKLES and not allow_pickle:
        refuse_pickle(root / file)
    weights = read_indexed(root, file) if file == _INDEX else read_weights(root, [file])
    documents = _documents(root, names, weights)
    raise_faults(root, weights.faults)
    return Bundle(root=root, tensors=weights.tensors, documents=documents)


def _choose(root: Path, names: list[str]) -> str:
    """Pick the file, or the index, that holds the tensors."""
    for name in (_USUAL[0], _INDEX, *_USUAL[1:], *_USUAL_PICKLES):
        if name in names:
            return name
    single = [name for name in names if name.endswith(".safetensors")]
    if len(single) == 1:
        return single[0]
    if single:
        what = f"{len(single)} files in {root.name or root} may be the adapter"
        raise InputError(what, where=str(root), problems=single, hint="Give one of the files.")
    found = some(contents(root)) or "nothing"
    what = f"there is no adapter in {root.name or root}: it holds {found}"
    hint = "An adapter folder holds adapter_model.safetensors and adapter_config.json."
    raise InputError(what, where=str(root), hint=hint)


def _documents(root: Path, names: list[str], weights: Weights) -> dict[str, Json]:
    documents = {}
    for name in names:
        if not name.endswith("config.json"):
            continue
        try:
            require_inside(root, root / name)
            documents[name] = read_json(root / name, limit=_CONFIG_LIMIT)
        except InputError as fault:
            if name == _CONFIG:
                weights.faults.append(fault)
    return documents
