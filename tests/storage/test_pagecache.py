"""What is let go of the page cache, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dora_convert.storage.pagecache import drop, is_larger_than_memory, want


def test_only_what_would_push_everything_out() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert not is_larger_than_memory(memory // 4)
    assert is_larger_than_memory(memory)


def test_the_system_is_told_which_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, gone = tmp_path / "a", tmp_path / "gone"
    file.write_bytes(bytes(10000))
    told: list[tuple[str, int, int, int]] = []

    def advise(fd: int, start: int, length: int, advice: int) -> None:
        told.append((str(Path(f"/proc/self/fd/{fd}").readlink()), start, length, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    drop([(file, 100, 5000), (gone, 0, 1), (file, 6000, 6001)])
    dontneed = os.POSIX_FADV_DONTNEED
    assert told == [(str(file), 100, 4900, dontneed), (str(file), 6000, 1, dontneed)]
    told.clear()
    want([(file, 7000, 7010)])
    assert told == [(str(file), 7000, 10, os.POSIX_FADV_WILLNEED)]


def test_a_system_that_takes_no_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    file = tmp_path / "a"
    file.write_bytes(b"1")
    drop([(file, 0, 1)])
    assert file.read_bytes() == b"1"
