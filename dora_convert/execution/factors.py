"""Factors on their way to a file: kept on disk until every rank is known, then laid out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert.core.adapter import LayerKind
from dora_convert.core.pairs import Factor, LoraFile, Pair
from dora_convert.maths.lowrank import Factors
from dora_convert.storage.dtypes import TORCH
from dora_convert.storage.oserrors import writing

__all__ = ["Scratch", "write_pairs"]


class Scratch:
    """A file for each module's factors, so that memory does not grow with their number."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        with writing(folder):
            folder.mkdir()
        self._files = {path: folder / f"{i}.safetensors" for i, path in enumerate(paths)}

    def keep(self, path: str, factors: Factors) -> None:
        """Store them as a pair of equal norms: neither factor may leave a narrow type's range."""
        root = factors.singular.sqrt()
        self.put(path, factors.left * root, root.unsqueeze(1) * factors.right)

    def put(self, path: str, left: Tensor, right: Tensor) -> None:
        """Store a pair as it is, in float32."""
        pair = {"left": left.float().contiguous(), "right": right.float().contiguous()}
        with writing(self._files[path]):
            save_file(pair, self._files[path])

    def take(self, path: str) -> tuple[Tensor, Tensor]:
        """`left [out, k]` and `right [k, in]` of the stored weight; the file is gone then."""
        pair = load_file(self._files[path])
        self._files[path].unlink()
        return pair["left"], pair["right"]


def write_pairs(folder: Path, lora: LoraFile, ranks: Mapping[str, int], scratch: Scratch) -> None:
    """The file in `folder`, one pair at a time, on the disk when it returns.

    `ranks`: how many factors of each layer there are; the rest of the stored rank is zeros.
    """
    file = folder / lora.name
    with writing(file):
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with writing(file):
            os.ftruncate(fd, lora.size)
        _pwrite(fd, file, memoryview(lora.head), 0)
        for pair in lora.pairs:
            factors = _factors(pair, ranks.get(pair.layer.path, 0), scratch)
            for factor, tensor in zip((pair.down, pair.up), factors, strict=True):
                data = _stored(factor, tensor).view(-1).view(torch.uint8)
                _pwrite(fd, file, data.numpy().data, lora.starts[factor.spec.name])
        with writing(file):
            os.fsync(fd)
    finally:
        os.close(fd)


def _pwrite(fd: int, file: Path, data: memoryview, offset: int) -> None:
    done = 0
    with writing(file):
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)


def _factors(pair: Pair, rank: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """`down` and `up` as PEFT has them: turned to the layer's own sense, padded, reshaped."""
    down, up = (torch.zeros(_natural(factor)) for factor in (pair.down, pair.up))
    layer = pair.layer
    if layer.empty or not rank:
        return down, up
    left, right = scratch.take(layer.path)
    left, right = left[:, :rank], right[:rank]
    # Of an embedding PEFT stores the transposed pair; a flipped layer is the transpose itself.
    if layer.flipped or layer.kind is LayerKind.EMBEDDING:
        left, right = right.T, left.T
    down.view(down.shape[0], -1)[:rank] = right
    up.view(up.shape[0], up.shape[1])[:, :rank] = left
    return down, up


def _natural(factor: Factor) -> tuple[int, ...]:
    return factor.spec.shape[::-1] if factor.turned else factor.spec.shape


def _stored(factor: Factor, tensor: Tensor) -> Tensor:
    if factor.heads:
        halves = tensor.view(factor.heads, 2, -1, tensor.shape[1])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    if factor.turned:
        tensor = tensor.T
    return tensor.to(TORCH[factor.spec.dtype]).contiguous()
