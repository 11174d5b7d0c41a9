"""The safetensors header: read from a file, and laid out from declared specs alone.

The format is described at https://github.com/huggingface/safetensors#format. The reader accepts
less than the library does. Errors here, and not there: a name given twice, empty, unprintable or of
more than 1000 characters; a key that the format does not know; a shape that torch cannot hold,
which has a zero beside sizes whose product overflows; a header of more than 48 MB, or of more than
300,000 tensors, which no model has in one file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dora_convert.core.tensors import DType, Slice, TensorRef, TensorSpec, stored_name
from dora_convert.errors import InputError
from dora_convert.storage.opening import opened, pread_exactly, quoted

__all__ = ["PT_METADATA", "Layout", "file_order", "layout", "read_header", "read_metadata"]

PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})

_FORMAT_LENGTH = 100_000_000
_MAX_LENGTH = 48_000_000
_MAX_TENSORS = 300_000
_MAX_METADATA = 10_000
_MAX_NAME = 1000
_MAX_RANK = 16
_MOST = 2**63 - 1  # elements
_MAX_KINDS = 1000
_MAX_ENTRY = 2000  # characters of one tensor's `{...}`; sixteen axes of 19 digits take 400
_KEYS = {"dtype", "shape", "data_offsets"}
_DTYPES = {dtype.label: dtype for dtype in DType}
_SPACE = re.compile(r"[ \t\n\r]*")
# So much of a JSON string at a time, or less: a longer one costs stack. Half a surrogate pair is no
# text. Nothing follows, so that it never goes back; possessive, it would be wrong before 3.11.5.
_PLAIN = r'[^"\\\x00-\x1f]*'
_STRING_PART = re.compile(
    rf'{_PLAIN}(?:(?:\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{{4}}'
    rf"|\\u[dD][89abAB][0-9a-fA-F]{{2}}\\u[dD][c-fC-F][0-9a-fA-F]{{2}}){_PLAIN}){{0,1000}}"
)
# A tensor and the comma after it, as all writers write them, and some a hundred thousand times.
_NUMBER = r"(?:0|[1-9][0-9]{0,18})"
_NUMBERS = rf"(?:{_NUMBER}(?:, ?{_NUMBER}){{0,{_MAX_RANK - 1}}})?"
_USUAL = re.compile(
    rf'"(?!__metadata__")(?P<name>[^"\\\x00-\x1f]{{1,{_MAX_NAME}}})": ?'
    rf'\{{"dtype": ?"(?P<dtype>\w{{1,12}})", ?"shape": ?\[(?P<shape>{_NUMBERS})\], ?'
    rf'"data_offsets": ?\[(?P<begin>{_NUMBER}), ?(?P<end>{_NUMBER})\]\}}, ?'
)
_AGAIN = "Download it again, or have it written again."


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 19:
        raise ValueError(digits)
    return int(digits)


def _not_natural(digits: str) -> int:
    raise ValueError(digits)


_ENTRY = json.JSONDecoder(
    object_pairs_hook=tuple,
    parse_int=_natural,
    parse_float=_not_natural,
    parse_constant=_not_natural,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """A file decided before it is written: its header, and where each tensor's bytes go."""

    head: bytes
    starts: Mapping[str, int]  # absolute offset of each tensor
    size: int


def file_order(spec: TensorSpec) -> tuple[int, str]:
    """What a file's tensors are sorted by: alignment, the widest first, then the name."""
    return -spec.dtype.order, stored_name(spec.name)


def layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str] = PT_METADATA) -> Layout:
    """Lay tensors out as safetensors' own writer does, byte for byte.

    It sorts them (`file_order`) and pads the header with spaces to 8 bytes.
    Tensors of a pipeline's component are stored under what they are called in it.
    """
    ordered = sorted(specs, key=file_order)
    body: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for spec in ordered:
        name = stored_name(spec.name)
        assert name not in body, spec.name
        offsets[spec.name], end = end, end + spec.nbytes
        body[name] = {
            "dtype": spec.dtype.label,
            "shape": list(spec.shape),
            "data_offsets": [offsets[spec.name], end],
        }
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    starts = {name: len(head) + offset for name, offset in offsets.items()}
    return Layout(head=head, starts=MappingProxyType(starts), size=len(head) + end)


def read_header(file: Path) -> dict[str, TensorRef]:
    """Read what a safetensors file holds, in the order of its header, and none of its data."""
    return _parsed(file).refs


def read_metadata(file: Path) -> dict[str, str]:
    """Read the text that its writer left in the header."""
    found: dict[str, str] | None = json.loads(_parsed(file).metadata)
    return found or {}


def _parsed(file: Path) -> _Header:
    try:
        with opened(file) as (fd, size):
            length = _length(fd, file, size)
            text = _decoded(pread_exactly(fd, file, length=length, offset=8))
        header = _Header(file, 8 + length)
        header.parse(text)
        header.check_cover(size - 8 - length)
    except _FaultError as fault:
        raise InputError(f"{file.name} {fault}", where=str(file), hint=fault.hint) from fault
    return header


class _FaultError(ValueError):
    """What is wrong, to be put after the file's name."""

    def __init__(self, text: str, hint: str = _AGAIN) -> None:
        super().__init__(text)
        self.hint = hint


def _length(fd: int, file: Path, size: int) -> int:
    if size < 8:
        raise _FaultError(f"is too short for a safetensors file: {size} bytes")
    length = int.from_bytes(pread_exactly(fd, file, length=8, offset=0), "little")
    if length == 0 or length > _FORMAT_LENGTH:
        text = f"is not a safetensors file: its first 8 bytes give a header of {length} bytes"
        raise _FaultError(text, "Check that this is the right file.")
    if length > _MAX_LENGTH:
        raise _FaultError(f"has a header of {length} bytes, more than the {_MAX_LENGTH} allowed")
    if length > size - 8:
        raise _FaultError(f"is truncated: its header takes {length} bytes and {size - 8} are there")
    return length


def _decoded(raw: bytes) -> str:
    # One character outside of ASCII makes all of the text two or four times as large in memory.
    if len(raw) > _MAX_LENGTH // 4 and not raw.isascii():
        raise _FaultError(f"has a header of {len(raw)} bytes, too long for one that is not ASCII")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _FaultError("has a broken header: it is not UTF-8") from error


class _Header:
    """Read tensor by tensor, so that a hostile header costs no more memory than an honest one."""

    def __init__(self, file: Path, data: int) -> None:
        self.refs: dict[str, TensorRef] = {}
        self.metadata = "null"
        self._file = file
        self._data = data  # where the tensors' bytes begin
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._kinds = _Kinds()

    def parse(self, text: str) -> None:
        if not text.startswith("{"):
            raise _FaultError("has a broken header: it is not a JSON object")
        refs, metadata = self.refs, False
        for name, value in _members(text):
            if name in refs or (name == "__metadata__" and metadata):
                raise _FaultError(f"names {quoted(name)} twice in its header")
            if name == "__metadata__":
                metadata = True
                assert isinstance(value, str)
                self.metadata = value
                continue
            if len(refs) == _MAX_TENSORS:
                raise _FaultError(f"holds more than {_MAX_TENSORS} tensors")
            if not name or not name.isprintable():
                raise _FaultError(f"has a tensor whose name {quoted(name)} is empty or unprintable")
            try:
                self._add(name, value)
            except _FaultError as fault:
                at = f"has a broken header at tensor {quoted(name)}: {fault}"
                raise _FaultError(at, fault.hint) from fault

    def _add(self, name: str, value: re.Match[str] | str) -> None:
        if isinstance(value, str):
            label, counts, begin, end = _entry(value)
        else:
            _, label, counts, first, last = value.groups()
            begin, end = int(first), int(last)
        dtype, shape, nbytes = self._kinds[label, counts]
        if end - begin != nbytes:
            raise _FaultError(
                f"{dtype.label} {list(shape)} takes {nbytes} bytes, "
                f"its data_offsets {begin} to {end} span {end - begin}"
            )
        spec = TensorSpec(name, dtype, shape)
        self.refs[name] = TensorRef(spec, Slice(self._file, self._data + begin), spec)
        self._begins.append(begin)
        self._ends.append(end)

    def check_cover(self, data: int) -> None:
        """Require that the tensors follow one another from 0 to the file's last byte."""
        at = 0
        for begin, end, name in sorted(zip(self._begins, self._ends, self.refs, strict=True)):
            if begin != at:
                gap = begin - at
                fault = f"{gap} unused bytes lie before" if gap > 0 else "another overlaps"
                raise _FaultError(f"has a broken header: {fault} tensor {quoted(name)}")
            at = end
        if at > data:
            raise _FaultError(f"is truncated: {at - data} bytes are missing", "Download it again.")
        if at < data:
            raise _FaultError(
                f"is damaged: {data - at} bytes too many are at its end", "Download it again."
            )


class _Kinds(dict[tuple[str, str], tuple[DType, tuple[int, ...], int]]):
    """Type, shape and bytes by what the header says of them: most tensors are like others."""

    def __missing__(self, key: tuple[str, str]) -> tuple[DType, tuple[int, ...], int]:
        label, counts = key
        found = _sized(label, tuple(map(int, counts.split(","))) if counts else ())
        if len(self) < _MAX_KINDS:
            self[key] = found
        return found


def _members(text: str) -> Iterator[tuple[str, re.Match[str] | str]]:
    """Each key of the object that `text` is, with its value: where that is usual, as a match."""
    at = _skip(text, 1)
    if text.startswith("}", at):
        _check_rest(text, at + 1)
        return
    while True:
        while (usual := _USUAL.match(text, at)) is not None:
            yield usual["name"], usual
            at = usual.end()
        name, at = _key(text, _skip(text, at))
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        end = _metadata_end(text, at) if name == "__metadata__" else text.find("}", at) + 1
        yield name, text[at:end]
        at = _skip(text, end)
        if text.startswith("}", at):
            _check_rest(text, at + 1)
            return
        at = _expect(text, at, ",")


def _metadata_end(text: str, at: int) -> int:
    """Give the place past the value at `at`: strings mapped to strings or, as mlx writes, null."""
    wrong = "has a broken header: __metadata__ must map strings to strings"
    if text.startswith("null", at):
        return at + len("null")
    if not text.startswith("{", at):
        raise _FaultError(wrong)
    at = _skip(text, at + 1)
    if text.startswith("}", at):
        return at + 1
    seen: set[str] = set()
    while True:
        key, at = _key(text, at)
        if key in seen:
            raise _FaultError(f"names {quoted(key)} twice in its header's __metadata__")
        if len(seen) == _MAX_METADATA:
            raise _FaultError(f"has more than {_MAX_METADATA} entries in its header's __metadata__")
        seen.add(key)
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        if not text.startswith('"', at):
            raise _FaultError(wrong)
        at = _skip(text, _string_end(text, at))
        if text.startswith("}", at):
            return at + 1
        at = _skip(text, _expect(text, at, ","))


def _key(text: str, at: int) -> tuple[str, int]:
    """The string at `at`, and the place past it."""
    end = _string_end(text, at)
    key: str = json.loads(text[at:end]) if end - at <= 12 * _MAX_NAME + 2 else ""
    if end - at > 2 and not 0 < len(key) <= _MAX_NAME:
        what = f"has a name of more than {_MAX_NAME} characters in its header: "
        raise _FaultError(what + quoted(text[at + 1 : at + 200]))
    return key, end


def _string_end(text: str, at: int) -> int:
    """The place past the string at `at`, which is not made: it may be as long as the header."""
    end = _expect(text, at, '"')
    while not text.startswith('"', end):
        part = _STRING_PART.match(text, end)
        if part is None or part.end() == end:
            raise _FaultError("has a broken header: it is not JSON")
        end = part.end()
    return end + 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _expect(text: str, at: int, char: str) -> int:
    if not text.startswith(char, at):
        raise _FaultError(
            f"has a broken header: it is not JSON, {char} is missing at character {at}"
        )
    return at + 1


def _check_rest(text: str, at: int) -> None:
    if _skip(text, at) != len(text):
        raise _FaultError(f"has a broken header: characters follow its end at character {at}")


def _entry(text: str) -> tuple[str, str, int, int]:
    """What one tensor's `{...}` says: dtype, the numbers of its shape, data_offsets."""
    if not text.startswith("{") or len(text) > _MAX_ENTRY:
        raise _FaultError("dtype, shape and data_offsets are not there")
    try:
        pairs = _ENTRY.decode(text)
    except (ValueError, RecursionError) as error:
        raise _FaultError("it is not JSON, or a number in it is not a whole one") from error
    info: dict[str, Any] = dict(pairs)
    if len(pairs) != len(_KEYS) or info.keys() != _KEYS:
        raise _FaultError("it must give dtype, shape and data_offsets, once, and nothing else")
    shape, offsets = info["shape"], info["data_offsets"]
    if not _are_counts(shape) or len(shape) > _MAX_RANK:
        raise _FaultError(f"its shape must be at most {_MAX_RANK} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _FaultError("its data_offsets must be two whole numbers")
    # Of no other value than a string is this the name of a type.
    return str(info["dtype"]), ",".join(map(str, shape)), offsets[0], offsets[1]


def _sized(label: str, shape: tuple[int, ...]) -> tuple[DType, tuple[int, ...], int]:
    """The type of this name, and how many bytes the shape takes in it."""
    dtype = _DTYPES.get(label)
    if dtype is None:
        raise _FaultError(f"dtype {quoted(label)} is not known")
    numel = math.prod(shape)
    if numel > _MOST or (numel == 0 and math.prod(size or 1 for size in shape) > _MOST):
        raise _FaultError(f"its shape {list(shape)} is too large for any machine")
    nbytes, rest = divmod(numel * dtype.bits, 8)
    if rest:
        raise _FaultError(f"{numel} elements of {dtype.label} are no whole bytes")
    return dtype, shape, nbytes


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
