"""Factors on their way to a file: kept on disk until every rank is known, then laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert.core.adapter import LayerKind
from dora_convert.core.lora import LoraLayer
from dora_convert.core.tensors import TensorSpec
from dora_convert.maths.lowrank import Factors
from dora_convert.storage.dtypes import TORCH
from dora_convert.storage.oserrors import writing
from dora_convert.storage.shards import ShardWriter

__all__ = ["Pair", "Scratch", "write_pairs"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a layer's factors go, and how many of them; the rest of the stored rank is zeros."""

    layer: LoraLayer
    rank: int
    down: TensorSpec
    up: TensorSpec


class Scratch:
    """A file for each module's factors, so that memory does not grow with their number."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        with writing(folder):
            folder.mkdir()
        self._files = {path: folder / f"{i}.safetensors" for i, path in enumerate(paths)}

    def keep(self, path: str, factors: Factors) -> None:
        """Store them as a pair of equal norms: neither factor may leave a narrow type's range."""
        root = factors.singular.sqrt()
        pair = {
            "left": (factors.left * root).float().contiguous(),
            "right": (root.unsqueeze(1) * factors.right).float().contiguous(),
        }
        with writing(self._files[path]):
            save_file(pair, self._files[path])

    def take(self, path: str) -> tuple[Tensor, Tensor]:
        """`left [out, k]` and `right [k, in]` of the stored weight; the file is gone then."""
        pair = load_file(self._files[path])
        self._files[path].unlink()
        return pair["left"], pair["right"]


def write_pairs(file: Path, pairs: Sequence[Pair], scratch: Scratch) -> None:
    """The adapter's weights, one pair at a time, on the disk when it returns."""
    specs = [spec for pair in pairs for spec in (pair.down, pair.up)]
    writer = ShardWriter(file, specs)
    try:
        for pair in pairs:
            down, up = _factors(pair, scratch)
            for spec, tensor in ((pair.down, down), (pair.up, up)):
                data = tensor.to(TORCH[spec.dtype]).contiguous().view(-1).view(torch.uint8)
                writer.write(spec.name, 0, data)
        writer.seal()
    finally:
        writer.close()


def _factors(pair: Pair, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """`down` and `up` as they are stored: turned to the layer's own sense, padded, reshaped."""
    down, up = torch.zeros(pair.down.shape), torch.zeros(pair.up.shape)
    layer, rank = pair.layer, pair.rank
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
