"""Who holds a folder is told where the system tells it. What the lock is for: test_staging.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dora_convert.errors import OutputError
from dora_convert.storage import locking
from dora_convert.storage.locking import is_at, locked


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "out.partial"
    fd = locked(folder)
    assert is_at(fd, folder)
    yield folder
    os.close(fd)


def refusal(folder: Path) -> str:
    with pytest.raises(OutputError) as caught:
        locked(folder)
    return str(caught.value)


def place(folder: Path, *, other: int = 0) -> str:
    stat = folder.stat()
    return f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino + other}"


@pytest.mark.parametrize(
    ("line", "who"),
    [
        ("1: FLOCK  ADVISORY  WRITE 4711 {here} 0 EOF", " (process 4711)"),
        ("1: FLOCK  ADVISORY  WRITE 4711 {there} 0 EOF", ""),
        ("1: POSIX  ADVISORY  WRITE 4711 {here} 0 EOF", ""),
        ("1: -> FLOCK  ADVISORY  WRITE 4711 {here} 0 EOF", ""),  # it waits
        ("1: FLOCK  ADVISORY  WRITE 0 {here} 0 EOF", ""),  # of another container
        ("1: FLOCK", ""),
        ("", ""),
    ],
)
def test_holder(
    held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, who: str
) -> None:
    table = tmp_path / "locks"
    other = "1: FLOCK  ADVISORY  WRITE 1 00:00:1 0 EOF\n"
    table.write_text(other + line.format(here=place(held), there=place(held, other=1)) + "\n")
    monkeypatch.setattr(locking, "_LOCKS", table)
    assert refusal(held).startswith(f"another run{who} is writing out")


def test_no_table(held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "_LOCKS", tmp_path / "absent")
    assert refusal(held).startswith("another run is writing out")


def test_renamed(held: Path) -> None:
    """The lock goes along; under the old name there is another folder."""
    fd = os.open(held, os.O_RDONLY)
    new = held.rename(held.with_name("new"))
    assert is_at(fd, new)
    assert not is_at(fd, held)
    os.close(fd)
    refusal(new)
    os.close(locked(held))
