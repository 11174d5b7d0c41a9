"""Opening an input file, and telling early what is no such file at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_convert.errors import InputError
from dora_convert.storage.oserrors import reading
from dora_convert.storage.sparse import require

__all__ = ["opened", "pread_exactly", "quoted"]

_CHUNK = 1 << 30
_HEAD = 64  # bytes by which impostors are told
_LFS = b"version https://git-lfs"
_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml")


@contextmanager
def opened(file: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file that is not empty, no git-lfs pointer and no web page: (fd, size).

    Anything that could block or have effects when opened (FIFO, device) is refused unopened.
    """
    with reading(file):
        kind = os.stat(file).st_mode  # noqa: PTH116 - follows links, opens nothing
        if not stat.S_ISREG(kind):
            found = "a folder" if stat.S_ISDIR(kind) else "a device, pipe or socket"
            raise InputError(f"{file.name} is {found}, not a file", where=str(file))
        require(file, 0, _HEAD)
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            _refuse_impostors(file, size, os.pread(fd, _HEAD, 0))
            yield fd, size
        finally:
            os.close(fd)


def pread_exactly(fd: int, file: Path, *, length: int, offset: int) -> bytes:
    """`length` bytes from `offset` on; a file that ends before them is an error."""
    parts = []
    require(file, offset, offset + length)
    while length:
        part = os.pread(fd, min(length, _CHUNK), offset)
        if not part:
            raise InputError(f"{file.name} became shorter while it was read", where=str(file))
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def quoted(text: str) -> str:
    """Show a foreign name: in quotes, escaped, not endless."""
    shown = json.dumps(text, ensure_ascii=not text.isprintable())
    return shown if len(shown) <= 200 else shown[:197] + '..."'


def _refuse_impostors(file: Path, size: int, head: bytes) -> None:
    if size == 0:
        what, hint = f"{file.name} is empty", "Download it again."
    elif head.startswith(_LFS):
        what = f"{file.name} is a git-lfs pointer: the file that it stands for was not downloaded"
        hint = f"git -C {file.parent} lfs pull"
    elif head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
        what = f"{file.name} is a web page, not the file: the download went wrong"
        hint = "Download it again; a private or gated repository needs a login first."
    else:
        return
    raise InputError(what, where=str(file), hint=hint)
