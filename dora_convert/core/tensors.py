"""What a tensor is, without holding one: dtype, spec, and a reference as plain data."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from dora_convert.core.quantized import QuantizedWeight

__all__ = [
    "COMPONENT_MARK",
    "DType",
    "Encoded",
    "Narrowed",
    "Permuted",
    "Pickled",
    "Reshaped",
    "Slice",
    "Source",
    "Step",
    "TensorRef",
    "TensorSpec",
    "stored_name",
]

# Between a component of a pipeline and the name that a tensor has in the component's files.
COMPONENT_MARK = "::"


class DType(enum.Enum):
    """Element types by their safetensors names, in the format's alignment order: (name, bits).

    The order is that of safetensors' own enumeration; its writer sorts tensors by it, descending.
    """

    BOOL = ("BOOL", 8)
    F4 = ("F4", 4)
    F6_E2M3 = ("F6_E2M3", 6)
    F6_E3M2 = ("F6_E3M2", 6)
    U8 = ("U8", 8)
    I8 = ("I8", 8)
    F8_E5M2 = ("F8_E5M2", 8)
    F8_E4M3 = ("F8_E4M3", 8)
    F8_E8M0 = ("F8_E8M0", 8)
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8)
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8)
    I16 = ("I16", 16)
    U16 = ("U16", 16)
    F16 = ("F16", 16)
    BF16 = ("BF16", 16)
    I32 = ("I32", 32)
    U32 = ("U32", 32)
    F32 = ("F32", 32)
    C64 = ("C64", 64)
    F64 = ("F64", 64)
    I64 = ("I64", 64)
    U64 = ("U64", 64)

    @property
    def label(self) -> str:
        """The name used in a safetensors header."""
        return self.value[0]

    @property
    def bits(self) -> int:
        """Size of one element."""
        return self.value[1]

    @property
    def order(self) -> int:
        """Rank in the format's alignment order."""
        return _ORDER[self]

    @property
    def is_weight(self) -> bool:
        """Whether a dense weight may be stored in it: a plain float of 16 bits or more."""
        return self in (DType.F16, DType.BF16, DType.F32, DType.F64)


_ORDER = {dtype: rank for rank, dtype in enumerate(DType)}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense row-major layout; sub-byte types are packed."""
        return math.prod(self.shape) * self.dtype.bits // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis; 0 where there is none."""
        rows = self.shape[0] if self.shape else 1
        return self.nbytes // rows if rows else 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Slice:
    """Row-major bytes inside a file, from `start` on."""

    file: Path
    start: int


@dataclass(frozen=True, slots=True)
class Pickled:
    """An entry of a torch pickle."""

    file: Path
    key: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A matrix in a quantisation scheme; `parts` are its stored tensors by role.

    `rest` are tensors that lie beside them and are not needed to decode it, such as its shape. If
    `rounded`, nothing is quantised: the parts are the dense matrix itself, and reading it gives
    what would come back if it were.
    """

    scheme: str
    weight: QuantizedWeight
    parts: Mapping[str, TensorRef]
    rest: tuple[TensorRef, ...] = ()
    rounded: bool = False


Source: TypeAlias = Slice | Pickled | Encoded


@dataclass(frozen=True, slots=True)
class Permuted:
    """Axes in another order; `(1, 0)` is the transpose of a matrix."""

    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Narrowed:
    """The entries `start:stop` of one axis."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Reshaped:
    """Same elements in row-major order under another shape."""

    shape: tuple[int, ...]


Step: TypeAlias = Permuted | Narrowed | Reshaped


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor to be had later: what it looks like, where it lies, how it is turned.

    `stored` is the tensor on disk; `spec` is what comes out after the `view` steps.
    """

    spec: TensorSpec
    source: Source
    stored: TensorSpec
    view: tuple[Step, ...] = ()

    @property
    def is_contiguous(self) -> bool:
        """Whether a block of rows is one range of the stored bytes."""
        return all(isinstance(step, Reshaped) for step in self.view)

    @property
    def slices(self) -> tuple[TensorRef, ...]:
        """What it is made of, as it lies in files: itself, or its parts; of a pickle nothing."""
        parts = self.source.parts.values() if isinstance(self.source, Encoded) else (self,)
        return tuple(
            TensorRef(part.stored, part.source, part.stored)
            for part in parts
            if isinstance(part.source, Slice)
        )

    @property
    def span(self) -> tuple[Path, int, int]:
        """Where the stored bytes of a slice lie: file, begin, end."""
        assert isinstance(self.source, Slice), self
        return self.source.file, self.source.start, self.source.start + self.stored.nbytes

    def row_span(self, start: int, stop: int) -> tuple[Path, int, int] | None:
        """The same of the rows `start:stop`; None where they lie apart, or are decoded."""
        if not isinstance(self.source, Slice) or not self.is_contiguous:
            return None
        first, row = self.source.start, self.spec.row_bytes
        return self.source.file, first + start * row, first + stop * row

    def transposed(self) -> TensorRef:
        """The matrix with its axes swapped."""
        assert len(self.spec.shape) == 2, self.spec
        return self.permuted(1, 0)

    def permuted(self, *axes: int) -> TensorRef:
        """The same elements with the axes in this order."""
        assert sorted(axes) == list(range(len(self.spec.shape))), (axes, self.spec)
        if len(axes) == 2 and self.view and self.view[-1] == Permuted(axes):
            return replace(self, spec=self._shaped(*self.spec.shape[::-1]), view=self.view[:-1])
        shape = (self.spec.shape[axis] for axis in axes)
        return replace(self, spec=self._shaped(*shape), view=(*self.view, Permuted(axes)))

    def narrowed(self, axis: int, start: int, stop: int) -> TensorRef:
        """The entries `start:stop` of one axis; free when these are all."""
        shape = list(self.spec.shape)
        assert 0 <= start <= stop <= shape[axis], (axis, start, stop, self.spec)
        if (start, stop) == (0, shape[axis]):
            return self
        shape[axis] = stop - start
        step = Narrowed(axis, start, stop)
        return replace(self, spec=self._shaped(*shape), view=(*self.view, step))

    def reshaped(self, *shape: int) -> TensorRef:
        """The same elements under another shape; free when the shape is the same."""
        assert math.prod(shape) == self.spec.numel, (shape, self.spec)
        if shape == self.spec.shape:
            return self
        return replace(self, spec=self._shaped(*shape), view=(*self.view, Reshaped(shape)))

    def matrix(self) -> TensorRef:
        """The same elements as `[rows, columns]`, all axes but the first flattened."""
        rows = self.spec.shape[0] if self.spec.shape else 1
        return self.reshaped(rows, self.spec.numel // max(rows, 1))

    def renamed(self, name: str) -> TensorRef:
        """The same tensor under another name."""
        return replace(self, spec=replace(self.spec, name=name))

    def _shaped(self, *shape: int) -> TensorSpec:
        return replace(self.spec, shape=shape)


def stored_name(name: str) -> str:
    """What a tensor is called in its file: the component of a pipeline is the file's folder."""
    return name.rpartition(COMPONENT_MARK)[2]
