"""Power that fails: what was not brought to the disk is not there, or is there full of zeros.

Both are what file systems do (ext4 and xfs were seen to): a new file of the full length, all of it
zeros, where its contents were not fsynced; no file, or an old name, where its folder was not.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.reliability.merges import Merges

_WRITES = ("write", "pwrite", "ftruncate", "copy_file_range")


class Disk:
    """Follows the calls of a run, and knows what of them a loss of power leaves."""

    def __init__(self, log: Path) -> None:
        self.synced: set[Path] = set()
        self.made: list[tuple[Path | None, Path]] = []  # names that no folder's fsync has kept yet
        # The last call was not made any more.
        for line in log.read_text().splitlines()[:-1]:
            name, *places = line.split("\t")
            self._follow(name, *map(Path, places))

    def _follow(self, name: str, place: Path, target: Path | None = None) -> None:
        if name in _WRITES:
            self.synced.discard(place)
        elif name == "fsync":
            self.synced.add(place)
            self.made = [(old, new) for old, new in self.made if new.parent != place]
        elif name in ("rename", "replace"):
            assert target is not None
            self.made.append((place, target))
            self.synced = {_moved(path, place, target) for path in self.synced}
            self.made = [(old, _moved(new, place, target)) for old, new in self.made]
        elif name in ("open", "mkdir"):
            self.made.append((None, place))

    def lose_contents(self, root: Path) -> None:
        """Names and lengths stay, contents do not."""
        for file in root.rglob("*"):
            if file.is_file() and file not in self.synced:
                file.write_bytes(bytes(file.stat().st_size))

    def lose_names(self) -> None:
        """As if the last changes of folders had not been."""
        for old, new in reversed(self.made):
            if not new.exists():
                continue
            if old is not None:
                new.rename(old)
            elif new.is_dir():
                shutil.rmtree(new)
            else:
                new.unlink()


def _moved(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def lose_at_every_call(merges: Merges, tmp_path: Path, what: str, *, step: int) -> None:
    """The same command ends the work, whatever the loss left of it."""
    log = tmp_path / "log"
    taken_over = set()
    point = 1
    while True:
        merges.clear()
        log.unlink(missing_ok=True)
        ended = merges.run(fault=merges.fault(point, log=str(log)))
        if ended.code == 0:
            break
        disk = Disk(log)
        if what == "names":
            disk.lose_names()
        else:
            disk.lose_contents(merges.place)
        taken_over.add(merges.resume())
        point += step
    assert point > 60
    assert len(taken_over) > 2


@pytest.mark.parametrize("what", ["contents", "names"])
def test_at_many_calls(merges: Merges, tmp_path: Path, what: str) -> None:
    lose_at_every_call(merges, tmp_path, what, step=9)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["contents", "names"])
def test_at_every_call(merges: Merges, tmp_path: Path, what: str) -> None:
    lose_at_every_call(merges, tmp_path, what, step=1)


def test_lost_contents(merges: Merges, tmp_path: Path) -> None:
    """A shard that is being written is full of zeros; those that are finished stay."""
    log = tmp_path / "log"
    merges.clear()
    fault = merges.fault(3, calls=("fsync",), about=".safetensors.tmp", log=str(log))
    assert merges.run(fault=fault).code == -9
    half = Path(log.read_text().splitlines()[-1].split("\t")[1])
    before = half.read_bytes()
    Disk(log).lose_contents(merges.place)
    assert half.read_bytes() == bytes(len(before)) != before
    assert len(merges.finished()) == 2
    assert merges.resume() == 2


def test_lost_name(merges: Merges, tmp_path: Path) -> None:
    """A shard has its old name again, if its folder was not fsynced."""
    log = tmp_path / "log"
    merges.clear()
    fault = merges.fault(1, "killed", calls=("rename",), about=".safetensors", log=str(log))
    assert merges.run(fault=fault).code == -9
    log.write_text(log.read_text() + "end\n")  # the last call was made
    names = {entry.name for entry in (merges.partial / "files").iterdir()}
    Disk(log).lose_names()
    assert "model-00001-of-00005.safetensors" in names
    files = {entry.name for entry in (merges.partial / "files").iterdir()}
    assert "model-00001-of-00005.safetensors" not in files
    assert "model-00001-of-00005.safetensors.tmp" in files
    assert merges.resume() == 0
