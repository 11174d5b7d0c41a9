"""What will be written, decided before the first byte: one Plan, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from dora_convert.core.adapter import DoraModule, TokenRows
from dora_convert.core.quantized import QuantizedWeight
from dora_convert.core.tensors import TensorRef, TensorSpec

__all__ = [
    "CarriedFile",
    "Cast",
    "Copy",
    "Document",
    "Job",
    "Merge",
    "Op",
    "PatchRows",
    "Piece",
    "Plan",
    "Quantise",
    "ScaleBias",
    "Shard",
    "WrittenFile",
]


@dataclass(frozen=True, slots=True)
class Copy:
    """The source's bytes as they are."""

    source: TensorRef


@dataclass(frozen=True, slots=True)
class Cast:
    """The source in another element type."""

    source: TensorRef


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start:stop` of the output are rows `offset:` of an adapted module."""

    start: int
    stop: int
    module: DoraModule
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Merge:
    """`m * V / ||V||` row block by row block; rows outside every piece are the base's own.

    `base` is a matrix `[rows, columns]`. A module with axis IN is one piece over all of it.
    """

    base: TensorRef
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class PatchRows:
    """The base with some rows replaced."""

    base: TensorRef
    patch: TokenRows


@dataclass(frozen=True, slots=True)
class ScaleBias:
    """A bias `[out]`, times what its weight's rows are multiplied with, `m / ||V||`.

    `base` and `pieces` as in `Merge`. Entries outside every piece stay as they are.
    """

    source: TensorRef
    base: TensorRef
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Quantise:
    """Rows as `Merge` makes them, stored in a quantisation scheme as the parts of `weight`.

    `scales` are the base's own by role, where they are to be kept, times the factor by which each
    row becomes longer; otherwise they are made anew.
    """

    base: TensorRef
    pieces: tuple[Piece, ...]
    scheme: str
    weight: QuantizedWeight
    scales: Mapping[str, TensorRef] = field(default_factory=dict)


Op: TypeAlias = Copy | Cast | Merge | PatchRows | ScaleBias | Quantise


@dataclass(frozen=True, slots=True)
class Job:
    """How one output tensor comes about. `output` is what it stands for, dense."""

    op: Op
    output: TensorSpec

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensors that the file holds of it: itself, or the parts of a quantised one."""
        if isinstance(self.op, Quantise):
            return tuple(self.op.weight.parts.values())
        return (self.output,)

    @property
    def slices(self) -> tuple[TensorRef, ...]:
        """What it reads of the base's files, as it lies there; of pickles nothing."""
        match self.op:
            case Copy(source) | Cast(source):
                return source.slices
            case ScaleBias(source, base):
                return (*source.slices, *base.slices)
            case _:
                return self.op.base.slices

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(spec.nbytes for spec in self.stored)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file."""

    file: str
    jobs: tuple[Job, ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors it holds."""
        return tuple(spec for job in self.jobs for spec in job.stored)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True, slots=True)
class CarriedFile:
    """A file copied from base or adapter."""

    name: str
    source: Path


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A text written by this tool."""

    name: str
    text: str


Document: TypeAlias = CarriedFile | WrittenFile


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that OUT will hold. `notes` say what a user should know before it runs."""

    shards: tuple[Shard, ...]
    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs, in shard order."""
        return tuple(job for shard in self.shards for job in shard.jobs)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(shard.nbytes for shard in self.shards)
