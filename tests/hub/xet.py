"""What hf_xet leaves in a `local://` store: which file, by sha256, is stored under which hash."""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["stored_bytes", "stored_files"]

_HEADER = _RECORD = 48
_END = b"\xff" * 32
_VERIFIED, _EXTENDED = 1 << 31, 1 << 30


def _hex(raw: bytes) -> str:
    """A hash as Xet prints it: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def stored_files(store: Path) -> dict[str, tuple[str, int]]:
    """Xet hash and size of each file, by sha256, from the shards' records of files."""
    found = {}
    for shard in (store / "xet" / "xorbs" / "shards").glob("*.mdb"):
        raw, at = shard.read_bytes(), _HEADER
        while at + _RECORD <= len(raw) and raw[at : at + 32] != _END:
            key = _hex(raw[at : at + 32])
            flags, count = struct.unpack_from("<II", raw, at + 32)
            at += _RECORD
            sizes = (struct.unpack_from("<I", raw, at + _RECORD * i + 36)[0] for i in range(count))
            size = sum(sizes)
            at += _RECORD * count * (2 if flags & _VERIFIED else 1)
            if flags & _EXTENDED:
                found[_hex(raw[at : at + 32])] = (key, size)
                at += _RECORD
    return found


def stored_bytes(store: Path, sha256: str, place: Path) -> bytes:
    """A file's contents, put together by hf_xet itself."""
    import hf_xet  # noqa: PLC0415 - not for the tests without it

    info = hf_xet.XetFileInfo(*stored_files(store)[sha256])
    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{store}") as group:
        group.start_download_file(info, str(place))
    return place.read_bytes()
