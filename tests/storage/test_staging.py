from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_convert.errors import OutputError
from dora_convert.storage import publishing, staging
from dora_convert.storage.oserrors import writing
from dora_convert.storage.staging import Staging


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below a folder, with the content of its files."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


def run(out: Path, *, overwrite: bool = False, text: str = "new") -> None:
    with Staging(out, nbytes=10, overwrite=overwrite) as work:
        (work.dir / "model.safetensors").write_text(text)
        (work.dir / "sub").mkdir()
        (work.dir / "sub" / "config.json").write_text("{}")
        work.publish()


DONE = {"out": None, "out/model.safetensors": "new", "out/sub": None, "out/sub/config.json": "{}"}


# ---------------------------------------------------------------------------------- publishing


def test_fresh(tmp_path: Path) -> None:
    run(tmp_path / "out")
    assert tree(tmp_path) == DONE


def test_onto_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(tmp_path / "out")
    assert tree(tmp_path) == DONE


def test_nothing_is_seen_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, nbytes=0, overwrite=False) as work:
        assert work.dir == tmp_path / "out.partial" / "files"
        assert not out.exists()
        work.publish()
        assert tree(tmp_path) == {"out": None}


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(publishing, "_exchange", lambda one, other: False)
    (tmp_path / "out" / "old").mkdir(parents=True)
    (tmp_path / "out" / "old" / "x").write_text("old")
    run(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == DONE


@pytest.mark.parametrize("code", [errno.EINVAL, None])
def test_where_folders_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    library = SimpleNamespace()
    if code is not None:
        library.renameat2 = lambda *args: -1
        monkeypatch.setattr(ctypes, "get_errno", lambda: code)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: library)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    run(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == DONE


def test_exchange_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(renameat2=lambda *args: -1)
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EIO)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: library)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    with pytest.raises(OutputError, match="out cannot be written: the disk reported an error"):
        run(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/x": "old"}


def test_the_old_folder_comes_back_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    rename, seen = os.rename, list[Any]()

    def third_fails(source: Any, target: Any) -> None:
        seen.append(source)
        if len(seen) == 3:
            raise OSError(errno.EIO, "x")
        rename(source, target)

    monkeypatch.setattr(publishing, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", third_fails)
    with pytest.raises(OutputError, match="the disk reported an error"):
        run(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/x": "old"}


def test_the_old_folder_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "old").mkdir(parents=True)

    def fails(path: Any) -> None:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(OutputError, match="out is complete, but what is left beside it") as caught:
        run(tmp_path / "out", overwrite=True)
    assert caught.value.where == (str(tmp_path / "out.partial"),)
    files = "out.partial/files"
    left = {"out.partial": None, files: None, f"{files}/old": None, "out.partial/.dora-convert": ""}
    assert tree(tmp_path) == DONE | left
    monkeypatch.undo()
    run(tmp_path / "out", overwrite=True)  # known as ours, so it does not stop the next run
    assert tree(tmp_path) == DONE


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """What was there comes back, where the run that was to replace it is given up."""
    (tmp_path / "out.partial" / "old").mkdir(parents=True)
    (tmp_path / "out.partial" / ".dora-convert").touch()
    (tmp_path / "out.partial" / "old" / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "out", nbytes=0, overwrite=True):
        raise ZeroDivisionError
    assert tree(tmp_path) == {"out": None, "out/x": "old"}


def test_somebody_fills_the_output_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(OutputError, match="out cannot be written: it exists already and is not"),
        Staging(out, nbytes=0, overwrite=False) as work,
    ):
        out.mkdir()
        (out / "x").write_text("theirs")
        work.publish()
    assert tree(tmp_path) == {"out": None, "out/x": "theirs"}


def test_link_as_output(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    run(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "disk") == DONE


def test_all_is_brought_to_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watch_fsync(fd: int) -> None:
        events.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    def watch_rename(source: Any, target: Any) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "rename", watch_rename)
    run(tmp_path / "out")
    # The marker is on the disk before there is anything that it marks.
    assert events[:2] == ["out.partial", tmp_path.name]
    events = events[2:]
    cut = events.index("rename")
    assert set(events[:cut]) == {"model.safetensors", "config.json", "sub", "files", "out.partial"}
    assert events.index("config.json") < events.index("sub") < events.index("files") < cut - 1
    assert events[cut + 1 :] == [tmp_path.name, "out.partial"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        run(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode
    file = tmp_path / "out" / "model.safetensors"
    assert stat.S_IMODE(file.stat().st_mode) == mode & 0o666


# ------------------------------------------------------------------------------ nothing is left


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_without_publishing(tmp_path: Path, error: type[BaseException] | None) -> None:
    (tmp_path / "out").mkdir()
    caught = pytest.raises(error) if error else contextlib.nullcontext()
    with caught, Staging(tmp_path / "out", nbytes=0, overwrite=True) as work:
        (work.dir / "model.safetensors").write_text("x")
        if error:
            raise error
    assert tree(tmp_path) == {"out": None}


@pytest.mark.parametrize("place", ["out.partial", "model.safetensors"])
def test_failure_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    fsync = os.fsync

    def fails(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name == place:
            raise OSError(errno.EIO, "x")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match="cannot be written: the disk reported an error"):
        run(tmp_path / "out")
    assert tree(tmp_path) == {}


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("call", ["flock", "statvfs"])
def test_failure_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fails(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "x")

    monkeypatch.setattr(fcntl if call == "flock" else os, call, fails)
    before = open_files()
    with pytest.raises(OutputError, match=r"out\.partial cannot be written: no locks available"):
        run(tmp_path / "out")
    assert open_files() == before
    assert tree(tmp_path) == {}


# ---------------------------------------------------------------------------------- the lock

HOLDER = """
import sys, time
from pathlib import Path
from dora_convert.storage.staging import Staging
with Staging(Path(sys.argv[1]), nbytes=0, overwrite=False) as work:
    (work.dir / "model.safetensors").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is in the middle of a run."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_two_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holder(out) as process:
        with pytest.raises(OutputError, match=r"another run( \(process \d+\))? is writing out"):
            run(out)
        assert tree(out.with_name("out.partial"))["files/model.safetensors"] == "half"
        process.communicate()  # its input ends, and so does it
        assert process.returncode == 0
    assert tree(tmp_path) == {}
    run(out)
    assert tree(tmp_path) == DONE


def test_killed_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holder(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    place = tmp_path / "out.partial" / "files"
    (place / "sub").mkdir()
    (place / "sub" / "x").write_text("x")
    assert (place / "model.safetensors").exists()
    run(out)
    assert tree(tmp_path) == DONE


def test_empty_folder_in_the_way_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    run(tmp_path / "out")
    assert tree(tmp_path) == DONE


def test_foreign_things_in_the_way(tmp_path: Path) -> None:
    place = tmp_path / "out.partial"
    place.mkdir()
    (place / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="was not made by this tool"):
        run(tmp_path / "out")
    assert tree(tmp_path) == {"out.partial": None, "out.partial/thesis.tex": "x"}
    (place / ".dora-convert").touch()  # also where we were before
    with pytest.raises(OutputError, match="was not made by this tool"):
        run(tmp_path / "out")
    assert (place / "thesis.tex").read_text() == "x"
    shutil.rmtree(place)
    place.write_text("x")
    with pytest.raises(OutputError, match="is not a folder"):
        run(tmp_path / "out")
    place.unlink()
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to("elsewhere")
    with pytest.raises(OutputError, match="is not a folder"):
        run(tmp_path / "out")


@pytest.mark.parametrize("how", ["before opening", "before locking"])
def test_the_other_run_ends_just_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The folder that is about to be locked goes away under its name; another one is made."""
    place = tmp_path / "out.partial"
    gone: list[str] = []

    def before(real: Any) -> Any:
        def first(*args: Any) -> Any:
            if not gone:
                gone.append(how)
                place.rename(tmp_path / "theirs")
            return real(*args)

        return first

    if how == "before opening":
        monkeypatch.setattr(os, "open", before(os.open))
    else:
        monkeypatch.setattr(fcntl, "flock", before(fcntl.flock))
    run(tmp_path / "out")
    assert gone == [how]
    assert tree(tmp_path) == DONE | {"theirs": None}


@pytest.mark.parametrize(
    ("blocks", "free", "enough"), [(10_000, 1000, False), (10_000, 1200, True), (0, 0, True)]
)
def test_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, free: int, enough: bool
) -> None:
    disk = SimpleNamespace(f_blocks=blocks, f_bavail=free, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    if enough:
        with Staging(tmp_path / "out", nbytes=3_500_000, overwrite=False):
            pass
    else:
        with pytest.raises(OutputError) as caught:
            Staging(tmp_path / "out", nbytes=3_500_000, overwrite=False).__enter__()
        assert caught.value.what == (
            "the disk has too little space: 4.549 MB needed, 4.096 MB free"
        )
        assert caught.value.where == (str(tmp_path),)
    assert tree(tmp_path) == {}


def test_sizes() -> None:
    assert staging._size(999) == "999 bytes"
    assert staging._size(2_500_000) == "2.5 MB"
    assert staging._size(16_100_000_000) == "16.1 GB"


# ------------------------------------------------------------------------------ real file systems


def test_small_disk(mounted: Path) -> None:
    with Staging(mounted / "out", nbytes=3_100_000, overwrite=False):
        (mounted / "x").write_bytes(bytes(500_000))
    with pytest.raises(OutputError, match=r"too little space: 4\.149 MB needed, 3\.\d+ MB free"):
        Staging(mounted / "out", nbytes=3_100_000, overwrite=False).__enter__()
    run(mounted / "out")
    with (
        pytest.raises(OutputError, match="files cannot be written: no space is left"),
        Staging(mounted / "out", nbytes=0, overwrite=True) as work,
        writing(work.dir),
    ):
        (work.dir / "model.safetensors").write_bytes(bytes(5_000_000))
    (mounted / "x").unlink()
    assert tree(mounted) == DONE


def test_read_only_disk(mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(OutputError, match=r"out\.partial cannot be written: the file system is"):
        run(mounted / "out")
    assert tree(mounted) == {}


def test_mount_point_as_output(mounted: Path) -> None:
    with pytest.raises(OutputError, match="disk cannot be written: it is in use"):
        run(mounted)
    assert [path.name for path in mounted.parent.iterdir()] == ["disk"]
