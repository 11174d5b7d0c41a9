"""The output folder: everything is written to `OUT.partial/`, and one rename publishes it.

`OUT.partial/` holds the marker, by which it is known as ours and which is the journal of a run that
can be continued; `files/`, which becomes OUT; and for a moment `old/`, which was OUT.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dora_convert.errors import InputError, MismatchError, OutputError, VerificationError
from dora_convert.storage.journal import Journal, is_unfinished
from dora_convert.storage.locking import is_at, locked
from dora_convert.storage.oserrors import writing
from dora_convert.storage.publishing import bring_to_disk, replace_folder, sync

__all__ = ["Staging", "check_output"]

_MARKER = ".dora-convert"
_PROBE = ".dora-convert-probe-"
_FRESH = f"{_MARKER}.new"  # the marker, until it is complete
_OURS = frozenset({_MARKER, _FRESH, "files", "old"})
_SLACK = 1 << 20  # for folders, and for the last block of each file
# After these what was written is not to be trusted: it was made of something else.
_WRONG = (InputError, MismatchError, VerificationError)


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
        tempfile.mkdtemp(prefix=_PROBE, dir=real.parent)
        for probe in real.parent.glob(f"{_PROBE}*"):  # and that of a run that was killed just then
            with suppress(FileNotFoundError):
                probe.rmdir()


class Staging:
    """Hold `OUT.partial/` for this process alone, and fill `dir`.

    It is gone on exit, unless a `journal` knows of shards in it: then a failure or an interruption
    leaves those, a note on the exception says so, and the next run with an equal journal has them.
    A wrong input, a mismatch or a failed verification leaves nothing. A run of another kind is
    refused such a folder, unless it is to `restart`.
    """

    def __init__(
        self,
        out: Path,
        *,
        nbytes: int,
        overwrite: bool,
        journal: Journal | None = None,
        restart: bool = False,
    ) -> None:
        self._out = _real(out)
        self._nbytes = nbytes
        self._overwrite = overwrite
        self._journal = journal
        self._restart = restart
        self._lock = -1
        self._is_ours = False
        self._published = False
        self._home = _partial(self._out)
        self._marker = self._home / _MARKER
        self._old = self._home / "old"
        self.dir = self._home / "files"

    def __enter__(self) -> Staging:
        try:
            with writing(self._home):
                self._lock = locked(self._home)
                self._take_over()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._leave(error)

    def publish(self) -> None:
        """Bring all to the disk, then let OUT appear, complete, in one step."""
        with writing(self._out):
            bring_to_disk(self.dir)
            sync(self._home)
            replace_folder(self.dir, self._out, old=self._old, overwrite=self._overwrite)
            self._published = True
            sync(self._out.parent)
            sync(self._home)
        try:
            self._clear()
        except OSError as error:
            what = f"{self._out.name} is complete, but what is left beside it cannot be deleted"
            hint = f"Delete {self._home}."
            raise OutputError(what, where=str(self._home), hint=hint) from error
        finally:
            self._release()

    def _take_over(self) -> None:
        """Keep of what an earlier run left what is of use; refuse a folder that is somebody's."""
        names = {entry.name for entry in self._home.iterdir()}
        if names - _OURS or (names - {_FRESH} and _MARKER not in names):
            what = f"{self._home.name} is in the way, and was not made by this tool"
            raise OutputError(what, where=str(self._home), hint="Move it away, or delete it.")
        if names:
            objection = None if self._restart else self._objection()
            if objection is not None:
                raise objection
            self._restore()
            if self._journal is not None and not self._restart:
                self._journal.take_over(self._marker, self.dir)
            self._prune()
        self._is_ours = True
        self._check_space()
        if self._journal is None:
            self._marker.write_bytes(b"")
        else:
            self._journal.begin(self._marker)
        self.dir.mkdir(exist_ok=True)
        sync(self._home)
        sync(self._home.parent)

    def _objection(self) -> OutputError | None:
        """Why what an earlier run left cannot be used, though it is worth something."""
        if self._journal is not None:
            return self._journal.objection(self._marker, self.dir)
        if not is_unfinished(self._marker, self.dir):
            return None
        what = f"{self._home.name} holds a merge that can still be finished"
        hint = f"Repeat that command to finish it, or delete {self._home} to give it up."
        return OutputError(what, where=str(self._home), hint=hint)

    def _restore(self) -> None:
        """A kill came while OUT was replaced in two steps: its old contents are OUT again."""
        if self._old.is_dir() and not self._out.exists():
            self._old.rename(self._out)

    def _check_space(self) -> None:
        disk = os.statvfs(self._home)
        free = disk.f_bavail * disk.f_frsize
        need = self._nbytes + _SLACK
        if self._journal is not None and not self._journal.away:
            need -= sum(entry.nbytes for entry in self._journal.sealed.values())
        if disk.f_blocks and free < need:  # some network file systems count nothing
            what = f"the disk has too little space: {_size(need)} needed, {_size(free)} free"
            hint = "Free some space, or choose another --output."
            raise OutputError(what, where=str(self._out.parent), hint=hint)

    def _leave(self, error: BaseException | None) -> None:
        """Remove what is of no use, as far as it lets itself be removed, if it is still ours."""
        if self._is_ours and self._lock >= 0 and is_at(self._lock, self._home):
            with suppress(OSError):
                self._restore()
                if error is not None and self._is_of_use(error):
                    self._prune()
                else:
                    self._clear()
        if error is not None:
            self._explain(error)
        self._release()

    def _is_of_use(self, error: BaseException) -> bool:
        known = self._journal is not None and bool(self._journal.sealed)
        return known and not self._published and not isinstance(error, _WRONG)

    def _explain(self, error: BaseException) -> None:
        if self._published and not isinstance(error, OutputError):
            error.add_note(f"{self._out.name} is complete.")
        elif self._journal is not None and self._is_of_use(error):
            count, total = len(self._journal.sealed), self._journal.total
            are = "is" if count == 1 else "are"
            place = "sent already" if self._journal.away else f"kept in {self._home.name}"
            error.add_note(f"{count} of {total} shards {are} {place}: the same command continues.")

    def _prune(self) -> None:
        """Delete all but the marker and the shards that the journal knows."""
        known = {} if self._journal is None else self._journal.sealed
        for entry in _entries(self._home):
            if entry.name != _MARKER and entry != self.dir:
                _delete(entry)
        for place, folders, names in os.walk(self.dir, topdown=False):
            for entry in (Path(place, name) for name in (*folders, *names)):
                if entry.is_dir() and not entry.is_symlink():
                    with suppress(OSError):  # it holds what is kept
                        entry.rmdir()
                elif entry.relative_to(self.dir).as_posix() not in known:
                    _delete(entry)

    def _clear(self) -> None:
        """Delete the folder; the marker last, so that what a kill leaves is still known as ours."""
        for place in (self.dir, self._old, self._home / _FRESH, self._marker):
            _delete(place)
        self._home.rmdir()

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


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(nbytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} GB"
