"""An adapter: a folder, or some or one of its files, read as data."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from dora_convert.core.bundle import Bundle, Json
from dora_convert.core.globs import matches_any
from dora_convert.core.tensors import DType, Pickled, Slice, TensorRef, TensorSpec
from dora_convert.errors import InputError
from dora_convert.storage.documents import read_json
from dora_convert.storage.folders import contents, list_files, require_inside, require_path
from dora_convert.storage.header import read_metadata
from dora_convert.storage.opening import opened, pread_exactly
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
# NVIDIA's LLaVA trainer saves magnitudes here, and the projector.
_BESIDE = {"adapter_model.bin": "non_lora_trainables.bin"}
_CONFIG = "adapter_config.json"
_CONFIG_LIMIT = 1 << 20


def open_bundle(
    path: Path,
    *,
    allow_pickle: bool = False,
    files: Sequence[str] = (),
    config: str | None = None,
) -> Bundle:
    """Read the headers and the JSON documents of the adapter at `path`.

    In a folder `files` are globs of the files to unite; without any, those that trainers usually
    write are looked for. `config` is a document that must be read, if it is there.
    """
    require_path(path, "adapter")
    with reading(path):
        root = path if path.is_dir() else path.parent
        names = list_files(root)
        chosen = _choose(root, names, files) if path.is_dir() else [path.name]
    for file in chosen:
        _check_suffix(root / file, allow_pickle=allow_pickle)
    indexed = chosen == [_INDEX]
    weights = read_indexed(root, _INDEX) if indexed else read_weights(root, chosen)
    documents = _documents(root, names, weights, config or _CONFIG)
    raise_faults(root, weights.faults)
    scalars = _scalars(weights.tensors.values())
    return Bundle(root, weights.tensors, documents, scalars, _metadata(root, weights.held))


def _check_suffix(file: Path, *, allow_pickle: bool) -> None:
    if file.name != _INDEX and not file.name.endswith((".safetensors", *PICKLES)):
        raise InputError(
            f"{file.name} is neither a safetensors file nor a torch pickle", where=str(file)
        )
    if file.suffix in PICKLES and not allow_pickle:
        refuse_pickle(file)


def _choose(root: Path, names: list[str], globs: Sequence[str]) -> list[str]:
    """Pick the files, or the index, that hold the tensors."""
    if globs:
        return _named(root, names, globs)
    for name in (_USUAL[0], _INDEX, *_USUAL[1:], *_USUAL_PICKLES):
        if name in names:
            beside = _BESIDE.get(name)
            return [name, beside] if beside is not None and beside in names else [name]
    single = [name for name in names if name.endswith(".safetensors")]
    if len(single) == 1:
        return single
    if single:
        what = f"{len(single)} files in {root.name or root} may be the adapter"
        raise InputError(what, where=str(root), problems=single, hint="Give one of the files.")
    found = some(contents(root)) or "nothing"
    what = f"there is no adapter in {root.name or root}: it holds {found}"
    hint = "An adapter folder holds adapter_model.safetensors and adapter_config.json."
    if any(name.endswith(".distcp") for name in names):
        what = f"{root.name or root} is a torch-dist checkpoint, which Megatron alone gathers"
        hint = "Save the .adapter. entries of the gathered state dict as one safetensors file."
    raise InputError(what, where=str(root), hint=hint)


def _named(root: Path, names: list[str], globs: Sequence[str]) -> list[str]:
    found = [name for name in names if matches_any(name, globs)]
    if not found:
        held = some(contents(root)) or "nothing"
        raise InputError(
            f"no file in {root.name or root} is called {' or '.join(globs)}: it holds {held}",
            where=str(root),
            hint="Give the file itself, if it has another name.",
        )
    return found


def _documents(root: Path, names: list[str], weights: Weights, config: str) -> dict[str, Json]:
    documents = {}
    for name in names:
        if not name.endswith("config.json") and name != config:
            continue
        try:
            require_inside(root, root / name)
            documents[name] = read_json(root / name, limit=_CONFIG_LIMIT)
        except InputError as fault:
            if name == config:
                weights.faults.append(fault)
    return documents


def _metadata(root: Path, files: Iterable[str]) -> dict[str, str]:
    """What the headers of the files say besides tensors; of several, the last word."""
    found: dict[str, str] = {}
    for file in files:
        if file.endswith(".safetensors"):
            found |= read_metadata(root / file)
    return found


# Little endian, as in the file format.
_UNPACKED = {DType.F16: "<e", DType.F32: "<f", DType.F64: "<d", DType.I32: "<i", DType.I64: "<q"}


def _scalars(refs: Iterable[TensorRef]) -> dict[str, float]:
    """The values of tensors with one element, complex numbers left out."""
    sliced: dict[Path, list[tuple[TensorSpec, int]]] = defaultdict(list)
    pickled: dict[Path, list[str]] = defaultdict(list)
    values = {}
    for ref in refs:
        if ref.stored.numel != 1 or ref.stored.dtype is DType.C64:
            continue
        if isinstance(ref.source, Pickled):
            pickled[ref.source.file].append(ref.source.key)
        elif isinstance(ref.source, Slice):
            sliced[ref.source.file].append((ref.stored, ref.source.start))
    for file, places in sliced.items():
        with opened(file) as (fd, _):
            for spec, start in places:
                raw = pread_exactly(fd, file, length=spec.nbytes, offset=start)
                values[spec.name] = _unpacked(spec.dtype, raw)
    for file, keys in pickled.items():
        from dora_convert.storage.pickled import open_pickle  # noqa: PLC0415 - it imports torch

        tensors = open_pickle(file)
        values |= {key: float(tensors[key].item()) for key in keys}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _unpacked(dtype: DType, raw: bytes) -> float:
    if dtype is DType.BF16:
        return _unpacked(DType.F32, b"\0\0" + raw)
    if dtype not in _UNPACKED:
        return math.nan
    (value,) = struct.unpack(_UNPACKED[dtype], raw)
    return float(value)
