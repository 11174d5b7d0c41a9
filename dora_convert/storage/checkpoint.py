"""A base model: its weight files, its config, and what is carried along beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from dora_convert.core.bundle import Checkpoint, Json
from dora_convert.core.fields import Fields
from dora_convert.core.quantized import DECLARED_IN
from dora_convert.core.tensors import COMPONENT_MARK, DType
from dora_convert.errors import InputError
from dora_convert.storage.documents import read_json
from dora_convert.storage.folders import contents, leaves, list_files, require_inside, require_path
from dora_convert.storage.gguf import GgufFile
from dora_convert.storage.opening import quoted
from dora_convert.storage.oserrors import reading
from dora_convert.storage.sums import SUMS
from dora_convert.storage.weights import (
    GGUF,
    PICKLES,
    Weights,
    is_shard,
    missing_shards,
    raise_faults,
    read_indexed,
    read_weights,
    refuse_pickle,
    shard_stem,
    some,
)

__all__ = ["carried_files", "is_carried", "is_declared", "open_checkpoint", "without_variants"]

_MODEL = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_INDEX = ".safetensors.index.json"
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
    | {".onnx_data", ".ot", ".mlmodel", ".tflite", ".npz", ".distcp"}
)
_NOT_CARRIED = frozenset({"README.md", "adapter_config.json", SUMS})
# sentence-transformers keeps the modules that follow the transformer in folders such as `2_Dense`,
# each with weights of its own that no adapter touches.
_MODULE_FOLDER = re.compile(r"\d+_[A-Za-z]\w*")
_HUB_MODEL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)")
# What image models are kept in with no word in a config.
_FP8 = (DType.F8_E4M3, DType.F8_E5M2)
_VARIANT = re.compile(
    r"(model|diffusion_pytorch_model)\.(?!safetensors)\w+(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?$"
)
_OTHER_RUNTIMES = frozenset({"onnx", "openvino", "original", "coreml"})


def open_checkpoint(
    path: Path, *, allow_pickle: bool = False, role: str = "base model"
) -> Checkpoint:
    """Read the headers and the config of the base model at `path`, a folder or one file."""
    require_path(path, role)
    with reading(path):
        folder = path.is_dir()
        root = path if folder else path.parent
        files = _choose(root, list_files(root)) if folder else _siblings(path)
        # A GGUF file is given by its name where others lie beside it.
        carried = carried_files(root) if folder or path.suffix == GGUF else ()
    weights = _read(root, files, allow_pickle=allow_pickle)
    if folder or weights.gguf:
        weights.faults += missing_shards(files)
    config = _config(root, weights)
    weights.faults += _unspeakable(weights)
    raise_faults(root, weights.faults)
    if weights.gguf:
        config = _as_gguf(root, config, weights.gguf)
    elif not is_declared(config) and any(r.spec.dtype in _FP8 for r in weights.tensors.values()):
        config = {**config, "quantization_config": {"quant_method": "scaled_fp8"}}
    return Checkpoint(
        root=root, tensors=weights.tensors, shards=weights.shards, config=config, files=carried
    )


def _read(root: Path, files: list[str], *, allow_pickle: bool) -> Weights:
    first = files[0].removesuffix(".index.json")
    if not first.endswith((".safetensors", GGUF, *PICKLES)):
        what = f"{first} is neither a safetensors nor a GGUF file, nor a torch pickle"
        raise InputError(what, where=str(root / first))
    if PurePath(first).suffix in PICKLES and not allow_pickle:
        refuse_pickle(root / files[0])
    if files[0] != first:
        return read_indexed(root, files[0])
    return read_weights(root, files)


def _choose(root: Path, names: list[str]) -> list[str]:
    """Pick the files that make up the model, or its index alone."""
    candidates = without_variants(name for name in names if not name.startswith(("adapter", ".")))
    chosen = _indexed(root, candidates) or _unindexed(candidates) or _pickles(candidates)
    chosen = chosen or _ggufs(root, candidates)
    if chosen:
        return chosen
    found = some(contents(root)) or "nothing"
    what = f"there is no base model in {root.name or root}: it holds {found}"
    hint = "A base model is a folder with model.safetensors, or shards of it, and config.json."
    if any(name.startswith("adapter") for name in names):
        hint = "This is an adapter; give the model that it was trained on."
    raise InputError(what, where=str(root), hint=hint)


def without_variants(names: Iterable[str]) -> list[str]:
    """The names, but for those of a variant of what is there: `NAME.fp16.safetensors` of diffusers.

    Where nothing but variants is there, all.
    """
    every = list(names)
    tensors = (name for name in every if ".safetensors" in name and not _VARIANT.match(name))
    plain = {name.partition(".")[0].partition("-")[0] for name in tensors}
    return [
        name for name in every if (found := _VARIANT.match(name)) is None or found[1] not in plain
    ]


def _indexed(root: Path, names: list[str]) -> list[str]:
    if _MODEL + ".index.json" in names:
        return [_MODEL + ".index.json"]
    indexes = [name for name in names if name.endswith(_INDEX)]
    plain = [name for name in indexes if not name.startswith("consolidated")]
    if _MODEL in names or (not plain and _model_files(names)):
        return []
    indexes = plain or indexes
    if len(indexes) > 1:
        what = f"{len(indexes)} indexes in {root.name or root} may be that of the base model"
        raise InputError(what, where=str(root), problems=indexes)
    return indexes


def _model_files(names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name.endswith(".safetensors") and not name.startswith("consolidated")
    ]


def _unindexed(names: list[str]) -> list[str]:
    if _MODEL in names:
        return [_MODEL]
    every = [name for name in names if name.endswith(".safetensors")]
    plain = _model_files(names) or every
    return [name for name in plain if is_shard(name)] or plain


def _pickles(names: list[str]) -> list[str]:
    for name in (_PICKLE + ".index.json", _PICKLE):
        if name in names:
            return [name]
    return [name for name in names if name.startswith("pytorch_model-") and name.endswith(".bin")]


def _ggufs(root: Path, names: list[str]) -> list[str]:
    """The one GGUF model of a folder, in one file or in several."""
    found = [name for name in names if name.endswith(GGUF)]
    models = {shard_stem(name) or name for name in found}
    if len(models) > 1:
        what = f"{len(models)} GGUF files in {root.name or root} may be the base model"
        raise InputError(what, where=str(root), problems=found, hint="Give one of them, a file.")
    return found


def _siblings(path: Path) -> list[str]:
    """The file itself, and of a GGUF that is split its other parts."""
    stem = shard_stem(path.name)
    if path.suffix != GGUF or stem is None:
        return [path.name]
    return [name for name in list_files(path.parent) if shard_stem(name) == stem]


def _as_gguf(root: Path, config: Json, files: Sequence[GgufFile]) -> Json:
    """The config, and how the weights lie in the files, which it cannot say."""
    texts = {key: text for file in files for key, text in file.texts.items()}
    if not config:
        url = texts.get("general.base_model.0.repo_url") or texts.get("general.source.url") or ""
        name = (
            url.removeprefix("https://huggingface.co/") if _HUB_MODEL.fullmatch(url) else "ORG/NAME"
        )
        raise InputError(
            "there is no config.json beside the GGUF file, which has not all that is in one",
            where=str(root),
            hint="Take it, and the tokenizer, from the model that the file was made from: "
            f'hf download {name} --include "*config.json" "*token*" "vocab*" "merges.txt" '
            f"--local-dir {root}",
        )
    types = {name: number for file in files for name, number in file.types.items()}
    words = {
        "quant_method": "gguf",
        "architecture": texts.get("general.architecture"),
        "types": types,
    }
    return {**config, "quantization_config": words}


def _unspeakable(weights: Weights) -> list[InputError]:
    """Names that would be taken for those of a pipeline's models."""
    marked = [quoted(name) for name in weights.tensors if COMPONENT_MARK in name]
    what = f"names with {COMPONENT_MARK!r} in them are not read: {some(marked)}"
    return [InputError(what)] if marked else []


def is_declared(config: Json) -> bool:
    """Whether it says how weights are quantised, of a part of the model perhaps."""
    return not DECLARED_IN.keys().isdisjoint(config) or any(
        isinstance(value, dict) and is_declared(value) for value in config.values()
    )


def _config(root: Path, weights: Weights) -> Json:
    file = root / "config.json"
    if not file.exists():
        return {}
    try:
        require_inside(root, file)
        config = read_json(file)
    except InputError as fault:
        weights.faults.append(fault)
        return {}
    problems: list[str] = []
    _check_kinds(config, file.name, problems)
    weights.faults += map(InputError, problems)
    return config


def _check_kinds(config: Json, place: str, problems: list[str]) -> None:
    """What decides how weights are named must be text; transformers takes nothing else either."""
    fields = Fields(config, place, problems)
    fields.text("model_type")
    if isinstance(config.get("architectures"), str):
        fields.reject("architectures", "must be a list of strings")
    fields.strings("architectures")
    for key, value in config.items():
        if isinstance(value, dict):
            _check_kinds(value, f"{place}, {quoted(key)}", problems)


def carried_files(root: Path) -> tuple[str, ...]:
    """What goes along with the weights of the model in `root`, sorted."""
    carried = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _is_passed_over(name)]
        for name in names:
            file = Path(place, name)
            relative = file.relative_to(root).as_posix()
            if is_carried(relative) and file.is_file() and not leaves(root, file):
                carried.append(relative)
    return tuple(sorted(carried))


def is_carried(file: str) -> bool:
    """Whether a file, named from the model's folder on, goes along with the model's weights."""
    *folders, name = file.split("/")
    if any(_is_passed_over(folder) for folder in folders):
        return False
    return bool(folders and _MODULE_FOLDER.fullmatch(folders[0])) or _is_small(name)


def _is_passed_over(folder: str) -> bool:
    return folder.startswith(".") or folder in _OTHER_RUNTIMES


def _is_small(name: str) -> bool:
    if name.startswith(".") or name in _NOT_CARRIED:
        return False
    return PurePath(name.removesuffix(".index.json")).suffix not in _WEIGHT_SUFFIXES
