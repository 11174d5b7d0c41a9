"""A LoRA on disk, decided before it is computed: every tensor, where it lies, how it is turned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dora_convert.core.lora import LoraLayer
from dora_convert.core.plan import Document
from dora_convert.core.tensors import TensorSpec

__all__ = ["Factor", "LoraFile", "Pair"]


@dataclass(frozen=True, slots=True)
class Factor:
    """One tensor of a pair, with PEFT's as the measure.

    `turned`: it is the transpose of PEFT's. `heads`: the rows belong to so many attention heads,
    and those of a head's two halves alternate; 0 leaves them as they are.
    """

    spec: TensorSpec
    turned: bool = False
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one layer."""

    layer: LoraLayer
    down: Factor
    up: Factor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.down.spec.nbytes + self.up.spec.nbytes


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A file of `size` bytes: `head`, then each tensor at its absolute offset in `starts`.

    `documents` are written beside it.
    """

    name: str
    head: bytes
    starts: Mapping[str, int]
    size: int
    pairs: tuple[Pair, ...]
    documents: tuple[Document, ...] = ()
