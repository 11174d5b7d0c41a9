"""One function for each parser of foreign files: any bytes are understood or refused, no third.

Each writes the bytes into a folder that it is given, reads them as the program does, and returns
whether they were taken. Only InputError and MismatchError may come out of the program; what it
takes must be what the reference makes of it, or make sense at least.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from dora_convert.api.reading import ReadOptions, open_spec, read_adapter
from dora_convert.core.bundle import Bundle
from dora_convert.core.tensors import DType, Encoded, Slice
from dora_convert.errors import InputError, MismatchError
from dora_convert.execution.decoding import decoded, open_reader
from dora_convert.planning.planner import plan_merge
from dora_convert.storage.bundle import open_bundle
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.header import read_header
from dora_convert.storage.pickled import open_pickle

__all__ = ["TARGETS"]

_PATHS = tuple(
    f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
)
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def header(data: bytes, folder: Path) -> bool:
    """A safetensors file; the reference must take it too, and find the same."""
    file = folder / "x.safetensors"
    file.write_bytes(data)
    try:
        refs = read_header(file)
    except InputError:
        return False
    try:
        theirs = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError("the reference refuses what was taken") from error
    assert refs.keys() == theirs.keys()
    for name, ref in refs.items():
        assert isinstance(ref.source, Slice)
        stored = data[ref.source.start : ref.source.start + ref.stored.nbytes]
        assert stored == bytes(theirs[name]["data"]), name
        assert list(ref.stored.shape) == theirs[name]["shape"], name
        assert ref.stored.dtype.label == theirs[name]["dtype"], name
    return True


def index(data: bytes, folder: Path) -> bool:
    """The index of a base in two shards, beside files that it must not lead to."""
    root = folder / "base"
    root.mkdir(exist_ok=True)
    for i, shard in enumerate(_SHARDS):
        if not (root / shard).exists():
            save_file(
                {"abcd"[2 * i]: torch.ones(2), "abcd"[2 * i + 1]: torch.ones(1)}, root / shard
            )
    outside = folder / "outside.safetensors"
    if not outside.exists():
        save_file({"a": torch.zeros(2)}, outside)
    (root / "model.safetensors.index.json").write_bytes(data)
    try:
        found = open_checkpoint(root)
    except InputError:
        return False
    assert set(found.shards.values()) <= set(_SHARDS)
    assert found.tensors.keys() == json.loads(data)["weight_map"].keys()
    return True


def peft_config(data: bytes, folder: Path) -> bool:
    """The config of an adapter of PEFT."""
    adapter, _ = _models(folder)
    (adapter / "adapter_config.json").write_bytes(data)
    try:
        found = read_adapter(adapter, ReadOptions())
    except InputError:
        return False
    assert found.modules.keys() == set(_PATHS)
    assert all(math.isfinite(module.scaling) for module in found.modules.values())
    return True


def model_config(data: bytes, folder: Path) -> bool:
    """The config of a base, as planning a merge understands it."""
    adapter, base = _models(folder)
    (base / "config.json").write_bytes(data)
    try:
        checkpoint = open_checkpoint(base)
        proposal = plan_merge(read_adapter(adapter, ReadOptions()), checkpoint)
    except (InputError, MismatchError):
        return False
    assert not proposal.problems
    return True


def quantized(data: bytes, folder: Path) -> bool:
    """A base in a quantisation scheme: its config, and dtype, shape and data of its tensors.

    Data are bytes, over and over. What is taken can be read.
    """
    base = folder / "quantized"
    base.mkdir(exist_ok=True)
    try:
        config, weights = _described(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False  # a fault of the description, not of the base
    (base / "config.json").write_text(config)
    (base / "model.safetensors").write_bytes(weights)
    try:
        found = decoded(open_checkpoint(base))
    except (InputError, MismatchError):
        return False
    encoded = [ref for ref in found.tensors.values() if isinstance(ref.source, Encoded)]
    for ref in encoded:
        row = torch.empty(ref.spec.row_bytes, dtype=torch.uint8)
        with open_reader().rows(ref) as blocks:
            count = min(ref.spec.shape[0], 1)
            assert blocks.read(0, count, row).numel() == count * math.prod(ref.spec.shape[1:])
    return bool(encoded)


def spec(data: bytes, folder: Path) -> bool:
    """A description of a layout, and an adapter read and written by it."""
    adapter, _ = _models(folder)
    file = folder / "mine.toml"
    file.write_bytes(data)
    bundle = open_bundle(adapter)
    try:
        mine = open_spec(file)
        mine.detect(bundle)
        written: Bundle = mine.write(mine.read(bundle))
    except InputError:
        return False
    assert written.tensors
    return True


def pickle(data: bytes, folder: Path) -> bool:
    """A torch pickle, loaded with the permission to."""
    file = folder / "x.bin"
    file.write_bytes(data)
    try:
        tensors = open_pickle(file)
    except InputError:
        return False
    for name, tensor in tensors.items():
        assert isinstance(name, str)
        assert tensor.numel() * tensor.itemsize <= len(data), name
        tensor.clone()  # every byte of it is there
    return True


def _described(data: bytes) -> tuple[str, bytes]:
    """The text of a config, and a safetensors file of small tensors."""
    given = json.loads(data)
    header: dict[str, Any] = {}
    body = b""
    for name, (dtype, shape, content) in given["tensors"].items():
        if not all(type(number) is int for number in (*shape, *content)):
            raise TypeError
        nbytes = math.prod(shape) * DType[dtype].bits // 8
        if not content or not 0 <= nbytes <= 1 << 14:
            raise ValueError
        begin = len(body)
        body += (bytes(content) * nbytes)[:nbytes]
        offsets = [begin, len(body)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    head = json.dumps(header).encode()
    return json.dumps(given["config"]), len(head).to_bytes(8, "little") + head + body


def _models(folder: Path) -> tuple[Path, Path]:
    """A small adapter and its base."""
    adapter, base = folder / "adapter", folder / "model"
    if not base.exists():
        base.mkdir()
        adapter.mkdir()
        save_file(
            {f"{path}.weight": torch.ones(6, 4) for path in _PATHS}, base / "model.safetensors"
        )
        parts: dict[str, torch.Tensor] = {}
        for path in _PATHS:
            key = f"base_model.model.{path}"
            parts[f"{key}.lora_A.weight"] = torch.ones(2, 4)
            parts[f"{key}.lora_B.weight"] = torch.ones(6, 2)
            parts[f"{key}.lora_magnitude_vector"] = torch.ones(6)
        save_file(parts, adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 4}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter, base


TARGETS: Mapping[str, Callable[[bytes, Path], bool]] = MappingProxyType(
    {
        "header": header,
        "index": index,
        "model_config": model_config,
        "peft_config": peft_config,
        "pickle": pickle,
        "quantized": quantized,
        "spec": spec,
    }
)
