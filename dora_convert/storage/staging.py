"""The output folder: everything is written to `OUT.partial/`, and one rename publishes it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dora_convert.errors import OutputError
from dora_convert.storage.oserrors import writing

__all__ = ["Staging", "check_output"]

_MARKER = ".dora-convert"
_SLACK = 1 << 20  # for folders, and for the last block of each file
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def check_output(out: Path, *, inputs: Sequence[Path], overwrite: bool) -> None:
    """Raise OutputError for all that would stop a run at its end, before it begins."""
    real = _real(out)
    for path in (real, *inputs):
        if not _is_utf8(path):
            what = f"the path {os.fsencode(path)!r} is not valid UTF-8"
            raise OutputError(what, hint="Rename the folder: safetensors cannot open it.")
    for place in (real, _partial(real)):
        _check_apart(out, place, inputs)
    with writing(out):
        if os.path.ismount(real):
            what = f"{out} is a mount point, which cannot be replaced"
            hint = f"Write to a folder inside it: --output {out / 'merged'}"
            raise OutputError(what, where=str(real), hint=hint)
        if real.exists() and not real.is_dir():
            hint = "Choose another --output: it names a folder."
            raise OutputError(f"{out} is a file", where=str(real), hint=hint)
        if real.is_dir() and any(real.iterdir()) and not overwrite:
            what = f"{out} exists already and is not empty"
            raise OutputError(what, where=str(real), hint="Pass --overwrite to replace it.")
        if not real.parent.exists():
            what = f"the folder of the output, {real.parent}, does not exist"
            raise OutputError(what, where=str(real), hint=f"mkdir -p {real.parent}")
    with writing(real.parent):
        # Nothing but trying tells: access() lets root through on a read-only file system.
        os.rmdir(tempfile.mkdtemp(prefix=_MARKER, dir=real.parent))  # noqa: PTH106


class Staging:
    """Hold `OUT.partial/` for this process alone; gone on exit unless it was published."""

    def __init__(self, out: Path, *, nbytes: int, overwrite: bool) -> None:
        self._out = _real(out)
        self._nbytes = nbytes
        self._overwrite = overwrite
        self._lock = -1
        self.dir = _partial(self._out)

    def __enter__(self) -> Staging:
        try:
            with writing(self.dir):
                self._lock = _locked(self.dir)
                self._take_over()
            self._check_space()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._leave()

    def publish(self) -> None:
        """Bring all to the disk, then let OUT appear, complete, in one step."""
        with writing(self._out):
            (self.dir / _MARKER).unlink()
            _sync(self.dir)
            _replace(self.dir, self._out, overwrite=self._overwrite)
            _sync_one(self._out.parent)
        self._release()

    def _take_over(self) -> None:
        """Empty the folder if an earlier run left it; refuse one that is somebody's."""
        names = {entry.name for entry in self.dir.iterdir()}
        if names and _MARKER not in names:
            self._release()
            what = f"{self.dir.name} is in the way, and was not made by this tool"
            raise OutputError(what, where=str(self.dir), hint="Move it away, or delete it.")
        (self.dir / _MARKER).touch()
        _empty(self.dir)

    def _check_space(self) -> None:
        with writing(self.dir):
            disk = os.statvfs(self.dir)
        free = disk.f_bavail * disk.f_frsize
        need = self._nbytes + _SLACK
        if disk.f_blocks and free < need:  # some network file systems count nothing
            what = f"the disk has too little space: {_size(need)} needed, {_size(free)} free"
            hint = "Free some space, or choose another --output."
            raise OutputError(what, where=str(self._out.parent), hint=hint)

    def _leave(self) -> None:
        """Remove the folder, as far as it lets itself be removed, if it is still ours."""
        if self._lock >= 0 and _is_at(self._lock, self.dir):
            shutil.rmtree(self.dir, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _is_utf8(path: Path) -> bool:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def _real(out: Path) -> Path:
    return Path(os.path.realpath(out))


def _partial(out: Path) -> Path:
    return out.parent / (out.name + ".partial")


def _check_apart(out: Path, place: Path, inputs: Sequence[Path]) -> None:
    for given in inputs:
        source = _real(given)
        if place == source:
            relation = "is"
        elif source.is_relative_to(place):
            relation = "contains"
        elif place.is_relative_to(source):
            relation = "lies inside"
        else:
            continue
        what = f"the output {out} {relation} the input {given}"
        raise OutputError(what, where=str(place), hint="Choose another --output.")


def _locked(folder: Path) -> int:
    """Make the folder if need be, and lock it; the lock dies with its holder.

    The lock lies on the folder itself and goes along when it is renamed. So a folder that was
    locked under its name a moment too late, after a rename, is let go, and the name tried again.
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
            if _is_at(fd, folder):
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


def _lock(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = f"another run is writing {folder.name.removesuffix('.partial')}"
        hint = "Wait until it ends, or choose another --output."
        raise OutputError(what, where=str(folder), hint=hint) from error


def _is_at(fd: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), folder.lstat())
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    """Delete all but the marker, so that what a kill leaves over is still known as ours."""
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _MARKER:
            path.unlink()


def _sync(folder: Path) -> None:
    """Bring every file and folder below to the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync_one(Path(place, name))
        _sync_one(Path(place))


def _sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace(source: Path, target: Path, *, overwrite: bool) -> None:
    """Rename a folder onto nothing, onto an empty folder or, if told so, onto a full one."""
    try:
        os.rename(source, target)  # noqa: PTH104
    except OSError as error:
        if not overwrite or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    fd = _locked(target)  # the old folder may turn up as OUT.partial: no other run is to take it
    try:
        old = source if _exchange(source, target) else _swap(source, target)
        _delete(old, target)
    finally:
        os.close(fd)


def _swap(source: Path, target: Path) -> Path:
    """Put `source` where `target` is, in two steps; return where the old one went."""
    old = Path(tempfile.mkdtemp(prefix=target.name + ".old-", dir=target.parent))
    os.rename(target, old)  # noqa: PTH104
    try:
        os.rename(source, target)  # noqa: PTH104
    except OSError:
        os.rename(old, target)  # noqa: PTH104
        raise
    return old


def _delete(old: Path, target: Path) -> None:
    try:
        (old / _MARKER).touch()
        _empty(old)
        shutil.rmtree(old)
    except OSError as error:
        what = f"{target.name} was replaced, but what was there before cannot be deleted"
        raise OutputError(what, where=str(old), hint=f"Delete {old}.") from error


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


def _size(nbytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} GB"
