"""Letting a folder appear under its final name, complete and in one step."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

__all__ = ["bring_to_disk", "replace_folder", "sync"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def bring_to_disk(folder: Path) -> None:
    """Wait until every file and folder below is there."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_folder(source: Path, target: Path, *, old: Path, overwrite: bool) -> None:
    """Rename `source` onto nothing, onto an empty folder or, if told so, onto a full one.

    What was there before ends up at `source` or, where two folders cannot be exchanged, at `old`;
    if this process dies between the two steps that it takes then, `old` is all there is of it.
    """
    try:
        os.rename(source, target)  # noqa: PTH104
    except OSError as error:
        if not overwrite or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(source, target):
            _swap(source, target, old)


def _swap(source: Path, target: Path, old: Path) -> None:
    os.rename(target, old)  # noqa: PTH104
    try:
        os.rename(source, target)  # noqa: PTH104
    except OSError:
        os.rename(old, target)  # noqa: PTH104
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where kernel, file system and C library can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))
