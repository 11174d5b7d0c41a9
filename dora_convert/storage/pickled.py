"""Torch pickles, restricted to flat dictionaries of tensors; nothing in them is ever run."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_convert.core.tensors import Pickled, TensorRef, TensorSpec
from dora_convert.errors import InputError
from dora_convert.storage import pickle_scan
from dora_convert.storage.dtypes import TORCH, from_torch
from dora_convert.storage.opening import opened, quoted
from dora_convert.storage.oserrors import writing

__all__ = ["open_pickle", "read_pickle_header", "save_pickle"]

_PLAIN = (Tensor, torch.nn.Parameter)
_KNOWN = frozenset(TORCH.values())
_ZIP, _RECORD = b"PK\x03\x04", "data.pkl"
_CONVERT = "Save it as safetensors with the program that wrote it."


def read_pickle_header(file: Path) -> dict[str, TensorRef]:
    """Every tensor of a torch pickle, as `read_header` gives those of a safetensors file."""
    refs = {}
    for key, tensor in open_pickle(file).items():
        spec = TensorSpec(key, from_torch(tensor.dtype), tuple(tensor.shape))
        refs[key] = TensorRef(spec=spec, source=Pickled(file, key), stored=spec)
    return refs


def open_pickle(file: Path) -> dict[str, Tensor]:
    """Load the tensors of a torch pickle, mapped from disk where the file allows it.

    Loaded with `weights_only=True` and never otherwise.
    """
    with opened(file) as (fd, _):
        zipped = os.pread(fd, len(_ZIP), 0) == _ZIP  # as torch tells them apart
        _check(file, zipped=zipped)
        content = _load(file, zipped=zipped)
    if not isinstance(content, dict):
        what = f"{file.name} holds a {type(content).__name__}, not a dictionary of tensors"
        raise InputError(what, where=str(file), hint=_CONVERT)
    problems = [problem for item in content.items() if (problem := _fault(*item))]
    if problems:
        what = f"{file.name} is not a flat dictionary of plain tensors"
        raise InputError(what, where=str(file), problems=problems, hint=_CONVERT)
    return {key: tensor.detach() for key, tensor in content.items()}


def save_pickle(source: Path, target: Path) -> None:
    """The tensors of a safetensors file as the flat dictionary that `torch.load` gives back.

    For trainers that read nothing else; on the disk when it returns. Raises OutputError.
    """
    with writing(target), target.open("xb") as file:
        torch.save(load_file(source), file)
        file.flush()
        os.fsync(file.fileno())


def _load(file: Path, *, zipped: bool) -> Any:
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=zipped)
    except Exception as error:  # torch raises a dozen kinds for a bad file
        wanted = re.search(r"(?:GLOBAL|REDUCE\S*|global) ([\w.]+)", str(error))
        if wanted is None:
            raise _damaged(file) from error
        what = f"{file.name} holds more than tensors ({wanted[1]:.100}), which is not run"
        raise InputError(what, where=str(file), hint=_CONVERT) from error


def _check(file: Path, *, zipped: bool) -> None:
    """Refuse what would take much to load, and compressed archives: storages are to be mapped."""
    try:
        excessive = _is_excessive_zip(file) if zipped else _is_excessive_old(file)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        what = f"{file.name} is damaged: its zip directory cannot be read"
        raise InputError(what, where=str(file), hint="Download it again.") from error
    except (ValueError, RuntimeError) as error:
        raise _damaged(file) from error
    if excessive:
        what = f"{file.name} holds far more than a dictionary of tensors"
        raise InputError(what, where=str(file), hint=_CONVERT)


def _is_excessive_zip(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        what = f"{file.name} is a compressed archive, which torch does not write"
        raise InputError(what, where=str(file), hint=_CONVERT)
    if any(e.filename.endswith(_RECORD) and e.file_size > pickle_scan.LARGEST for e in entries):
        return True
    # By torch's own reader: an archive can be made that two readers do not see as the same.
    return pickle_scan.is_excessive(torch._C.PyTorchFileReader(str(file)).get_record(_RECORD))


def _is_excessive_old(file: Path) -> bool:
    # Two numbers, the machine, the object, and the order of the data that follows.
    with file.open("rb") as stream:
        return pickle_scan.is_excessive(stream.read(pickle_scan.LARGEST), pickles=5)


def _damaged(file: Path) -> InputError:
    what = f"{file.name} is damaged or not a torch pickle of tensors"
    return InputError(what, where=str(file), hint="Download it again, or have it written again.")


def _fault(key: object, value: object) -> str:
    """Say what keeps one entry from being a named plain tensor; empty if nothing does."""
    if not isinstance(key, str) or not key or not key.isprintable():
        return f"the key {quoted(str(key))} is not a printable name"
    if type(value) not in _PLAIN or not isinstance(value, Tensor):
        return f"{quoted(key)} is a {type(value).__name__}, not a tensor"
    trouble = ""
    if value.is_quantized:
        trouble = "is a quantized tensor"
    elif value.layout is not torch.strided or value.is_nested:
        trouble = "is a sparse or nested tensor"
    elif value.device.type != "cpu":
        trouble = f"has no data (device {value.device.type})"
    elif value.numel() * value.itemsize > value.untyped_storage().nbytes():
        trouble = f"has {value.numel()} elements, more than are stored"
    elif value.dtype not in _KNOWN:
        trouble = f"has an element type that is not supported ({value.dtype})"
    return f"{quoted(key)} {trouble}" if trouble else ""
