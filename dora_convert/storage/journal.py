"""What a run has finished so far, so that the same command can go on after a failure."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dora_convert.errors import OutputError
from dora_convert.storage.digest import file_sha256
from dora_convert.storage.fingerprint import Fingerprint, Inputs, difference
from dora_convert.storage.oserrors import writing
from dora_convert.storage.room import require_room

__all__ = ["Journal", "Sealed", "is_unfinished"]

_WORKERS = 4  # that hash at once


@dataclass(frozen=True, slots=True)
class Sealed:
    """A shard on the disk, and what was measured while it was written, as JSON has it."""

    file: str
    nbytes: int
    sha256: str
    found: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """A text file: the plan's fingerprint, then a line for each shard that is on the disk.

    `files` are the shards that the plan has. Every line is on the disk before it counts, and the
    shard that it tells of before the line is written. Shards that are `away` were taken elsewhere
    before their line was written, and are not looked for on the disk.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        files: Collection[str],
        inputs: Inputs,
        *,
        away: bool = False,
    ) -> None:
        self.away = away
        self.sealed: dict[str, Sealed] = {}
        self.kept: frozenset[str] = frozenset()
        self._fingerprint = fingerprint
        self._files = frozenset(files)
        self._inputs = inputs
        self._path: Path | None = None

    @property
    def total(self) -> int:
        """The number of shards in all."""
        return len(self._files)

    def objection(self, path: Path, folder: Path) -> OutputError | None:
        """Say why what the journal at `path` tells of cannot be used: it is of another plan."""
        was, sealed = _read(path)
        if was is None or was == self._fingerprint or not self._there(sealed, folder):
            return None
        return OutputError(
            f"{path.parent.name} was begun by another command: "
            f"{difference(was, self._fingerprint)}",
            where=str(path.parent),
            hint="Pass --restart to begin anew, or repeat that command to finish it.",
        )

    def take_over(self, path: Path, folder: Path) -> None:
        """Keep the shards in `folder` whose contents are still what the journal says."""
        was, sealed = _read(path)
        known = []
        if was == self._fingerprint:
            known = [entry for entry in self._there(sealed, folder) if entry.file in self._files]
        require_room(_WORKERS)
        with ThreadPoolExecutor(_WORKERS) as pool:
            intact = pool.map(
                lambda entry: self.away or _is_intact(folder / entry.file, entry), known
            )
            self.sealed = {e.file: e for e, same in zip(known, intact, strict=True) if same}
        self.kept = frozenset(self.sealed)

    def _there(self, sealed: list[Sealed], folder: Path) -> list[Sealed]:
        return sealed if self.away else _on_disk(sealed, folder)

    def begin(self, path: Path) -> None:
        """Write the journal anew, with the shards that were taken over."""
        fresh = path.with_name(path.name + ".new")
        lines = [_line({"fingerprint": self._fingerprint})]
        lines += [_line(asdict(entry)) for entry in self.sealed.values()]
        with fresh.open("wb") as stream:
            stream.write(b"".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
        self._path = path

    def add(self, entry: Sealed) -> None:
        """A shard is on the disk. Raises InputError if the inputs are not what they were."""
        assert self._path is not None
        self._inputs.require_unchanged()
        with writing(self._path):
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                line = _line(asdict(entry))
                done = 0
                while done < len(line):
                    done += os.write(fd, line[done:])
                os.fsync(fd)
            finally:
                os.close(fd)
        self.sealed[entry.file] = entry


def is_unfinished(path: Path, folder: Path) -> bool:
    """Whether the journal at `path` tells of shards that are there."""
    return bool(_on_disk(_read(path)[1], folder))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _read(path: Path) -> tuple[Fingerprint | None, list[Sealed]]:
    """As far as it goes: the last line may have been cut off, by a kill or by a full disk."""
    try:
        lines = [json.loads(line) for line in _whole_lines(path.read_bytes())]
        return lines[0]["fingerprint"], [Sealed(**line) for line in lines[1:]]
    except (FileNotFoundError, ValueError, TypeError, KeyError, IndexError):
        return None, []


def _whole_lines(data: bytes) -> list[bytes]:
    return data.split(b"\n")[:-1]


def _on_disk(sealed: list[Sealed], folder: Path) -> list[Sealed]:
    return [entry for entry in sealed if _has(folder / entry.file, entry.nbytes)]


def _is_intact(file: Path, entry: Sealed) -> bool:
    try:
        return file_sha256(file) == entry.sha256
    except OSError:  # it is written once more
        return False


def _has(file: Path, nbytes: int) -> bool:
    return not file.is_symlink() and file.is_file() and file.stat().st_size == nbytes
