"""The seam at which what the system refuses becomes an error of this package."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_convert.errors import InputError, OutputError

__all__ = ["enough_memory", "reading", "writing"]

# What torch and Python say where there is none, without a type of their own.
_NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "can't start new thread")

_COMMON = {
    errno.EACCES: ("permission is denied", ""),
    errno.EPERM: ("the operation is not permitted", ""),
    errno.EIO: ("the disk reported an error", "Check the disk or the network share."),
    errno.ENOENT: ("it does not exist", ""),
    errno.ENOTDIR: ("a part of its path is not a folder", ""),
    errno.ELOOP: ("its symbolic links go round in a circle", ""),
    errno.ENAMETOOLONG: ("its name is too long for the file system", ""),
    errno.EMFILE: ("too many files are open", "Raise the limit: ulimit -n 4096"),
    errno.ENFILE: ("too many files are open on this machine", ""),
    errno.ESTALE: ("the network file system lost it", ""),
}

_READING = {
    **_COMMON,
    errno.EISDIR: ("it is a folder, not a file", ""),
}

_WRITING = {
    **_COMMON,
    errno.ENOSPC: ("no space is left on the disk", "Free some space, or choose another --output."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, or choose another --output."),
    errno.EROFS: ("the file system is read-only", "Choose another --output."),
    errno.EFBIG: (
        "it would be larger than the file system or the limit of this process allows",
        "Pass a smaller --max-shard-size, or see ulimit -f.",
    ),
    errno.EEXIST: ("it exists already", ""),
    errno.ENOTEMPTY: ("it exists already and is not empty", "Pass --overwrite to replace it."),
    errno.EISDIR: ("it exists already as a folder", ""),
    errno.EBUSY: ("it is in use, perhaps a mount point", "Choose a folder inside it."),
    errno.EXDEV: ("it lies on two file systems", ""),
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError raised inside into an InputError about `path`."""
    try:
        yield
    except OSError as error:
        _require_memory(error)
        reason, hint = _explain(error, _READING)
        what = f"{path.name or path} cannot be read: {reason}"
        raise InputError(what, where=str(path), hint=hint) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError raised inside into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        _require_memory(error)
        reason, hint = _explain(error, _WRITING)
        what = f"{path.name or path} cannot be written: {reason}"
        raise OutputError(what, where=str(path), hint=hint) from error


@contextmanager
def enough_memory(name: str = "") -> Iterator[None]:
    """Turn a lack of memory inside into an OutputError, about the tensor `name` if it is given."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = any(message in str(error) for message in _NO_MEMORY)
        if isinstance(error, RuntimeError) and not told:
            raise
        what = "the memory does not suffice" + (f" for {name}" if name else "")
        hint = "Pass a smaller --workers, or see ulimit -v and the limit of the container."
        told_in_full = OutputError(what, hint=hint)
        for note in getattr(error, "__notes__", ()):
            told_in_full.add_note(note)
        raise told_in_full from error


def _require_memory(error: OSError) -> None:
    """A lack of memory is no fault of the file that was just in hand."""
    if error.errno == errno.ENOMEM:
        raise MemoryError from error


def _explain(error: OSError, reasons: dict[int, tuple[str, str]]) -> tuple[str, str]:
    if error.errno is None:
        return str(error), ""
    return reasons.get(error.errno, (os.strerror(error.errno).lower(), ""))
