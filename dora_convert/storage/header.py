"""The safetensors header: read from a file, and laid out from declared specs alone.

The format is described at https://github.com/huggingface/safetensors#format. The reader accepts
less than the library does: a name given twice, a name that cannot be printed and a key that the
format does not know are errors here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dora_convert.core.tensors import DType, Slice, TensorRef, TensorSpec
from dora_convert.errors import InputError
from dora_convert.storage.opening import opened, pread_exactly, quoted

__all__ = ["PT_METADATA", "Layout", "layout", "read_header"]

PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})

_MAX_LENGTH = 100_000_000
_MAX_TENSORS = 500_000
_MAX_RANK = 16
_MAX_ENTRY = 2000  # characters of one tensor's `{...}`; sixteen axes of 19 digits take 400
_KEYS = {"dtype", "shape", "data_offsets"}
_DTYPES = {dtype.label: dtype for dtype in DType}
_SPACE = re.compile(r"[ \t\n\r]*")
_AGAIN = "Download it again, or have it written again."


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 19:
        raise ValueError(digits)
    return int(digits)


def _not_natural(digits: str) -> int:
    raise ValueError(digits)


_STRING = json.JSONDecoder()
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


def layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str] = PT_METADATA) -> Layout:
    """Lay tensors out as safetensors' own writer does, byte for byte.

    It sorts by alignment, the widest first, then by name, and pads with spaces to 8 bytes.
    """
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.order, spec.name))
    body: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for spec in ordered:
        assert spec.name not in body, spec.name
        offsets[spec.name], end = end, end + spec.nbytes
        body[spec.name] = {
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
    try:
        with opened(file) as (fd, size):
            length = _length(fd, file, size)
            raw = pread_exactly(fd, file, length=length, offset=8)
        entries = _parse(raw)
        _check_cover(entries, size - 8 - length)
    except _FaultError as fault:
        raise InputError(f"{file.name} {fault}", where=str(file), hint=fault.hint) from fault
    refs = {}
    for name, (spec, start, _) in entries.items():
        refs[name] = TensorRef(spec=spec, source=Slice(file, 8 + length + start), stored=spec)
    return refs


class _FaultError(ValueError):
    """What is wrong, to be put after the file's name."""

    def __init__(self, text: str, hint: str = _AGAIN) -> None:
        super().__init__(text)
        self.hint = hint


_Entry = tuple[TensorSpec, int, int]  # spec, begin, end


def _length(fd: int, file: Path, size: int) -> int:
    if size < 8:
        raise _FaultError(f"is too short for a safetensors file: {size} bytes")
    length = int.from_bytes(pread_exactly(fd, file, length=8, offset=0), "little")
    if length == 0 or length > _MAX_LENGTH:
        text = f"is not a safetensors file: its first 8 bytes give a header of {length} bytes"
        raise _FaultError(text, "Check that this is the right file.")
    if length > size - 8:
        raise _FaultError(f"is truncated: its header takes {length} bytes and {size - 8} are there")
    return length


def _parse(raw: bytes) -> dict[str, _Entry]:
    """Tensor by tensor, so that a hostile header costs no more memory than an honest one."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _FaultError("has a broken header: it is not UTF-8") from error
    if not text.startswith("{"):
        raise _FaultError("has a broken header: it is not a JSON object")
    entries: dict[str, _Entry] = {}
    metadata = False
    for name, begin in _keys(text, 0):
        if name in entries or (name == "__metadata__" and metadata):
            raise _FaultError(f"names {quoted(name)} twice in its header")
        if name == "__metadata__":
            metadata = True
            continue
        if len(entries) == _MAX_TENSORS:
            raise _FaultError(f"holds more than {_MAX_TENSORS} tensors")
        if not name or not name.isprintable():
            raise _FaultError(f"has a tensor whose name {quoted(name)} is empty or unprintable")
        try:
            entries[name] = _entry(name, text[begin : text.find("}", begin) + 1])
        except _FaultError as fault:
            at = f"has a broken header at tensor {quoted(name)}: {fault}"
            raise _FaultError(at, fault.hint) from fault
    return entries


def _keys(text: str, at: int) -> Iterable[tuple[str, int]]:
    """Each key of the object at `at`, with the place where its value begins."""
    at = _skip(text, at + 1)
    if text.startswith("}", at):
        _check_rest(text, at + 1)
        return
    while True:
        name, at = _string(text, at)
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        yield name, at
        at = _metadata_end(text, at) if name == "__metadata__" else text.find("}", at) + 1
        at = _skip(text, at)
        if text.startswith("}", at):
            _check_rest(text, at + 1)
            return
        at = _skip(text, _expect(text, at, ","))


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
        key, at = _string(text, at)
        if key in seen:
            raise _FaultError(f"names {quoted(key)} twice in its header's __metadata__")
        if len(seen) == _MAX_TENSORS:
            raise _FaultError(f"has more than {_MAX_TENSORS} entries in its header's __metadata__")
        seen.add(key)
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        if not text.startswith('"', at):
            raise _FaultError(wrong)
        at = _skip(text, _string(text, at)[1])
        if text.startswith("}", at):
            return at + 1
        at = _skip(text, _expect(text, at, ","))


def _string(text: str, at: int) -> tuple[str, int]:
    _expect(text, at, '"')
    try:
        value, end = _STRING.raw_decode(text, at)
        value.encode()  # half a surrogate pair is no text
    except ValueError as error:
        raise _FaultError("has a broken header: it is not JSON") from error
    return value, end


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


def _entry(name: str, text: str) -> _Entry:
    """Read one tensor from its `{...}`."""
    if not text.startswith("{") or len(text) > _MAX_ENTRY:
        raise _FaultError("dtype, shape and data_offsets are not there")
    try:
        pairs = _ENTRY.decode(text)
    except (ValueError, RecursionError) as error:
        raise _FaultError("it is not JSON, or a number in it is not a whole one") from error
    info: dict[str, Any] = dict(pairs)
    if len(pairs) != len(_KEYS) or info.keys() != _KEYS:
        raise _FaultError("it must give dtype, shape and data_offsets, once, and nothing else")
    dtype = _DTYPES.get(info["dtype"]) if isinstance(info["dtype"], str) else None
    if dtype is None:
        raise _FaultError(f"dtype {quoted(str(info['dtype']))} is not known")
    shape, offsets = info["shape"], info["data_offsets"]
    if not _are_counts(shape) or len(shape) > _MAX_RANK:
        raise _FaultError(f"its shape must be at most {_MAX_RANK} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _FaultError("its data_offsets must be two whole numbers")
    return _sized(TensorSpec(name, dtype, tuple(shape)), offsets[0], offsets[1])


def _sized(spec: TensorSpec, begin: int, end: int) -> _Entry:
    if spec.numel * spec.dtype.bits % 8:
        raise _FaultError(f"{spec.numel} elements of {spec.dtype.label} are no whole bytes")
    if end - begin != spec.nbytes:
        raise _FaultError(
            f"{spec.dtype.label} {list(spec.shape)} takes {spec.nbytes} bytes, "
            f"its data_offsets {begin} to {end} span {end - begin}"
        )
    return spec, begin, end


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_cover(entries: Mapping[str, _Entry], data: int) -> None:
    """Require that the tensors follow one another from 0 to the file's last byte."""
    at = 0
    for spec, begin, end in sorted(entries.values(), key=itemgetter(1, 2)):
        if begin != at:
            fault = f"{begin - at} unused bytes lie before" if begin > at else "another overlaps"
            raise _FaultError(f"has a broken header: {fault} tensor {quoted(spec.name)}")
        at = end
    if at > data:
        raise _FaultError(f"is truncated: {at - data} bytes are missing", "Download it again.")
    if at < data:
        raise _FaultError(
            f"is damaged: {data - at} bytes too many are at its end", "Download it again."
        )
