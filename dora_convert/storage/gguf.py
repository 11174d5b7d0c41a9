"""The head of a GGUF file: which tensors it holds, and where their bytes lie.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; versions 2 and
3 are read. Rows of a quantised tensor are whole blocks of bytes: such a tensor is `[..., bytes]`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from dora_convert.core.extras import required
from dora_convert.core.tensors import DType, Slice, TensorRef, TensorSpec
from dora_convert.errors import InputError
from dora_convert.storage.opening import opened, pread_exactly, quoted

__all__ = ["GgufFile", "read_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_TENSORS = 300_000
_MAX_FIELDS = 100_000
_MAX_ITEMS = 10_000_000  # of an array: far more than any vocabulary
_MAX_NAME = 1000
_MAX_TEXT = 1 << 20
_MAX_RANK = 4
_MOST = 2**63 - 1  # bytes
_CHUNK = 1 << 20
_ALIGNMENT: Final = "general.alignment"

# Of a field's value, by the number that stands before it.
_STRUCTS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_DENSE = {0: DType.F32, 1: DType.F16, 30: DType.BF16, 28: DType.F64}
# What llama.cpp computes from the config, to have it at hand.
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Tensors by llama.cpp's names, the number of each one's type, and the fields that are text."""

    tensors: Mapping[str, TensorRef]
    types: Mapping[str, int]
    texts: Mapping[str, str]


def read_gguf(file: Path) -> GgufFile:
    """Read what a GGUF file holds, and none of its data. Raises InputError."""
    sizes = _sizes()
    with opened(file) as (fd, size):
        head = _Head(fd, file, size)
        try:
            return _parsed(head, file, sizes)
        except _FaultError as fault:
            raise InputError(
                f"{file.name} {fault}", where=str(file), hint="Download it again."
            ) from fault


class _FaultError(ValueError):
    """What is wrong, to be put after the file's name."""


def _sizes() -> dict[int, tuple[int, int]]:
    """Elements and bytes of a block, by the number of the type."""
    library = required("gguf", "gguf", "a GGUF file")
    return {int(number): sizes for number, sizes in library.GGML_QUANT_SIZES.items()}


class _Head:
    """The file from its start on; nothing is held of what is skipped."""

    def __init__(self, fd: int, file: Path, size: int) -> None:
        self._fd, self._file, self._size = fd, file, size
        self._chunk, self._first = b"", 0
        self.at = 0

    def take(self, count: int) -> bytes:
        start = self.at - self._first
        if start < 0 or start + count > len(self._chunk):
            self._require(count)
            length = min(max(count, _CHUNK), self._size - self.at)
            self._chunk = pread_exactly(self._fd, self._file, length=length, offset=self.at)
            self._first, start = self.at, 0
        self.at += count
        return self._chunk[start : start + count]

    def skip(self, count: int) -> None:
        self._require(count)
        self.at += count

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, limit: int) -> str:
        length = self.number("<Q")
        if length > limit:
            raise _FaultError(f"has a text of {length} bytes in its head, more than {limit}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise _FaultError("has a name in its head that is no text") from error

    def require_inside(self, end: int) -> None:
        if end > self._size:
            raise _FaultError(f"is truncated: {end} bytes are needed and {self._size} are there")

    def _require(self, count: int) -> None:
        self.require_inside(self.at + count)


def _parsed(head: _Head, file: Path, sizes: Mapping[int, tuple[int, int]]) -> GgufFile:
    if head.take(4) != _MAGIC:
        raise _FaultError("is not a GGUF file")
    version = head.number("<I")
    if version not in _VERSIONS:
        raise _FaultError(f"is of version {version:#x} of GGUF, and 2 and 3 are known here")
    tensors, fields = head.number("<Q"), head.number("<Q")
    if tensors > _MAX_TENSORS or fields > _MAX_FIELDS:
        raise _FaultError(f"claims to hold {tensors} tensors and {fields} fields")
    texts, alignment = _fields(head, fields)
    entries = [_entry(head, sizes) for _ in range(tensors)]
    start = head.at + -head.at % alignment
    refs: dict[str, TensorRef] = {}
    types: dict[str, int] = {}
    for spec, number, offset in entries:
        if spec.name in types:
            raise _FaultError(f"holds {quoted(spec.name)} twice")
        head.require_inside(start + offset + spec.nbytes)
        refs[spec.name] = TensorRef(spec, Slice(file, start + offset), spec)
        types[spec.name] = number
    _refuse_overlaps(refs.values())
    for name in _COMPUTED:
        refs.pop(name, None)
    return GgufFile(refs, types, texts)


def _fields(head: _Head, count: int) -> tuple[dict[str, str], int]:
    """Those that are text, and to how many bytes tensors are aligned."""
    texts: dict[str, str] = {}
    alignment = 32
    for _ in range(count):
        name, value = _field(head)
        if isinstance(value, str):
            texts[name] = value
        elif name == _ALIGNMENT and value is not None:
            alignment = value
    if alignment < 8 or alignment & (alignment - 1):
        raise _FaultError(f"aligns its tensors to {alignment} bytes")
    return texts, alignment


def _field(head: _Head) -> tuple[str, str | int | None]:
    """A field's name, and its value if that is a short text or a whole number of 32 bits."""
    name = head.text(_MAX_NAME)
    kind = head.number("<I")
    if kind == _STRING:
        return name, head.text(_MAX_TEXT)
    if _STRUCTS.get(kind) == "<I":
        return name, head.number("<I")
    _skip_value(head, kind)
    return name, None


def _skip_value(head: _Head, kind: int, depth: int = 0) -> None:
    if kind in _STRUCTS:
        head.skip(struct.calcsize(_STRUCTS[kind]))
    elif kind == _STRING:
        head.skip(head.number("<Q"))
    elif kind == _ARRAY and depth < _MAX_RANK:
        inner, count = head.number("<I"), head.number("<Q")
        if inner in _STRUCTS:
            head.skip(count * struct.calcsize(_STRUCTS[inner]))
            return
        if count > _MAX_ITEMS:
            raise _FaultError(f"has a list of {count} entries in its head")
        for _ in range(count):
            _skip_value(head, inner, depth + 1)
    else:
        raise _FaultError(f"has a field of an unknown type in its head: {kind}")


def _entry(head: _Head, sizes: Mapping[int, tuple[int, int]]) -> tuple[TensorSpec, int, int]:
    """One tensor: how its bytes are seen, the number of its type, and its offset."""
    name = head.text(_MAX_NAME)
    if not name.isprintable() or not name:
        raise _FaultError(f"has a tensor with an unusable name: {quoted(name)}")
    rank = head.number("<I")
    if not 1 <= rank <= _MAX_RANK:
        raise _FaultError(f"gives {quoted(name)} {rank} axes")
    shape = tuple(head.number("<Q") for _ in range(rank))[::-1]
    number, offset = head.number("<I"), head.number("<Q")
    if number not in sizes:
        raise _FaultError(f"holds {quoted(name)} in type {number}, which gguf does not know")
    block, nbytes = sizes[number]
    if shape[-1] % block or not 0 < math.prod(shape) * nbytes <= _MOST:
        raise _FaultError(f"gives {quoted(name)} the shape {list(shape)}, in blocks of {block}")
    if number in _DENSE:
        return TensorSpec(name, _DENSE[number], shape), number, offset
    stored = (*shape[:-1], shape[-1] // block * nbytes)
    return TensorSpec(name, DType.U8, stored), number, offset


def _refuse_overlaps(refs: Iterable[TensorRef]) -> None:
    spans = sorted((ref.span[1:], ref.spec.name) for ref in refs)
    for ((_, end), first), ((begin, _), second) in pairwise(spans):
        if begin < end:
            raise _FaultError(f"gives {quoted(first)} and {quoted(second)} the same bytes")
