"""A folder that one process holds for itself; the lock dies with its holder."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from dora_convert.errors import OutputError

__all__ = ["is_at", "locked"]

_LOCKS = Path("/proc/locks")


def locked(folder: Path) -> int:
    """Make the folder if need be, and lock it; a descriptor, with which the lock goes.

    The lock lies on the folder itself and goes along when it is renamed. So a folder that was
    locked under its name a moment too late, after a rename, is let go, and the name tried again.
    Raises OutputError, at once, where another process holds it, and OSError.
    """
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            if folder.is_symlink() or not folder.is_dir():
                what = f"{folder.name} is in the way, and is not a folder"
                raise OutputError(what, where=str(folder), hint="Move it away.") from None
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            _lock(fd, folder)
            if is_at(fd, folder):
                return fd
        except OSError:
            os.close(fd)
            with suppress(OSError):
                folder.rmdir()
            raise
        except OutputError:
            os.close(fd)
            raise
        os.close(fd)


def is_at(fd: int, folder: Path) -> bool:
    """Whether the open folder still has this name."""
    try:
        return os.path.samestat(os.fstat(fd), folder.lstat())
    except FileNotFoundError:
        return False


def _lock(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(fd)
        who = f" (process {holder})" if holder else ""
        what = f"another run{who} is writing {folder.name.removesuffix('.partial')}"
        hint = "Wait until it ends, or choose another --output."
        raise OutputError(what, where=str(folder), hint=hint) from error


def _holder(fd: int) -> str:
    """The id of the process that holds the lock, where the system tells; else nothing."""
    stat = os.fstat(fd)
    place = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    with suppress(OSError):
        for line in _LOCKS.read_text(encoding="ascii", errors="replace").splitlines():
            # 1: FLOCK  ADVISORY  WRITE 4711 fe:00:2181547 0 EOF
            match line.split():
                case [_, "FLOCK", _, _, process, at, *_] if at == place and int(process) > 0:
                    return process
    return ""
