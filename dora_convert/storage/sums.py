"""The hashes of an output's files, kept beside them as `sha256sum` writes and checks them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from dora_convert.storage.digest import file_sha256
from dora_convert.storage.folders import leaves
from dora_convert.storage.opening import opened, pread_exactly
from dora_convert.storage.oserrors import reading, writing
from dora_convert.storage.room import require_room

__all__ = ["SUMS", "amended_sums", "changed_files", "has_sums", "sums_text", "write_sums"]

SUMS = "SHA256SUMS"

_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)")
# GNU coreutils marks a line with a backslash where the name needs them.
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_PLAIN = {escaped: plain for plain, escaped in _ESCAPES.items()}


def sums_text(sums: Mapping[str, str]) -> str:
    """One line for each file, sorted by name; `sums` maps names to hashes."""
    lines = []
    for name in sorted(sums):
        escaped = re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found[0]], name)
        lines.append(f"{'' if escaped == name else chr(92)}{sums[name]}  {escaped}\n")
    return "".join(lines)


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Hash all files below `folder`, but for those `known`, and bring the list to the disk."""
    sums = dict(known)
    target = folder / SUMS
    with writing(target):
        for file in folder.rglob("*"):
            name = file.relative_to(folder).as_posix()
            if name not in known and file.is_file():
                sums[name] = file_sha256(file)
    with writing(target), target.open("wb") as stream:
        stream.write(os.fsencode(sums_text(sums)))
        stream.flush()
        os.fsync(stream.fileno())


def amended_sums(folder: Path, name: str, data: bytes) -> bytes:
    """The folder's list for a place where the file `name` holds `data` instead."""
    text, sums = _read(folder)
    if sums is None or name not in sums:
        return os.fsencode(text)
    return os.fsencode(sums_text(sums | {name: sha256(data).hexdigest()}))


def has_sums(folder: Path) -> bool:
    """Whether hashes were kept with this output."""
    return (folder / SUMS).is_file()


def changed_files(folder: Path, *, workers: int) -> tuple[int, list[str]]:
    """How many files the list names, and a line for each that is not as it says.

    A change of the list itself is told too, as far as it makes it another text than was written.
    Raises InputError for what cannot be read.
    """
    _, sums = _read(folder)
    if sums is None:
        return 0, [f"{SUMS}: it is not as it was written"]

    def compare(name: str) -> str | None:
        file = folder / name
        if not file.is_file() or leaves(folder, file):
            return f"{name}: missing, though {SUMS} names it"
        with reading(file):
            found = file_sha256(file)
        return None if found == sums[name] else f"{name}: sha256 {found}, not {sums[name]}"

    require_room(workers)
    with ThreadPoolExecutor(workers) as pool:
        return len(sums), [line for line in pool.map(compare, sums) if line is not None]


def _read(folder: Path) -> tuple[str, dict[str, str] | None]:
    with opened(folder / SUMS) as (fd, size):
        text = os.fsdecode(pread_exactly(fd, folder / SUMS, length=size, offset=0))
    return text, _parsed(text)


def _parsed(text: str) -> dict[str, str] | None:
    """Hash by name; None for what `sums_text` does not write."""
    sums = {}
    for line in text.split("\n")[:-1]:
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        mark, digest, name = match.groups()
        if mark:
            name = re.sub(r"\\[\\nr]", lambda found: _PLAIN[found[0]], name)
        sums[name] = digest
    return sums if sums_text(sums) == text else None
