"""The same as the other tests here by the system's own means: every call is seen, Python's or not.

`strace` hits a call by its number, also those of C code, such as the exchange of two folders.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest

from tests.reliability.merges import Merges
from tests.reliability.nursery import Ended

CALLS = (
    "pwrite64",
    "write",
    "ftruncate",
    "copy_file_range",
    "fsync",
    "rename",
    "mkdir",
    "unlink",
    "rmdir",
)


def traced(merges: Merges, inject: str, *options: object) -> Ended:
    """A merge to which strace does what `inject` says, from its first call on."""
    command = merges.command("--workers", "1", "-q", *options)
    process = merges.nursery.start(*command, stopped=True)
    words = ["strace", "-f", "-o", os.devnull, "-e", f"trace={inject.partition(':')[0]}"]
    tracer = subprocess.Popen(
        [*words, "-e", f"inject={inject}", "-p", str(process)], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    attached = "attached" in said
    os.kill(process, signal.SIGCONT if attached else signal.SIGKILL)
    ended = merges.nursery.ended()
    tracer.communicate()
    if not attached:
        pytest.skip(f"tracing is not allowed here: {said.strip()}")
    return ended


@pytest.fixture(autouse=True)
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed; the other tests hit the calls that Python makes")


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_every_call(merges: Merges, call: str) -> None:
    points = 0
    while True:
        merges.clear()
        ended = traced(merges, f"{call}:signal=SIGKILL:when={points + 1}")
        if ended.code == 0:
            break
        assert ended.code == -9, ended
        points += 1
        merges.resume()
    assert points > 0


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", [call for call in CALLS if call != "write"])
def test_error_at_every_call(merges: Merges, call: str, error: str) -> None:
    """But for `write`: that is also how a result is printed."""
    point = 0
    while True:
        point += 1
        merges.clear()
        ended = traced(merges, f"{call}:error={error}:when={point}")
        assert ended.code in (0, 5), ended
        finished = merges.finished()
        merges.resume()
        if ended.code == 0 and not merges.partial.exists():
            break
        assert "Traceback" not in ended.err
        assert ("the same command continues" in ended.err) == bool(finished)
    assert point > 1


def reading_errors(merges: Merges, call: str, points: range) -> int:
    """EIO at some reads of the inputs; the number of the runs that it stopped."""
    box, stopped = merges.box, 0
    inputs = {file.name for folder in (box.base, box.adapter) for file in folder.iterdir()}
    for point in points:
        merges.clear()
        ended = traced(merges, f"{call}:error=EIO:when={point}", "--verify", "all")
        if ended.code == 0:  # there were fewer
            break
        assert ended.code == 3, (point, ended)
        (line, *_) = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
        name, _, what = line.removeprefix("Error: ").partition(" cannot be read: ")
        assert name in inputs, ended
        assert what == "the disk reported an error", ended
        assert not list(merges.place.iterdir())
        stopped += 1
    return stopped


@pytest.mark.parametrize("call", ["pread64", "preadv,preadv2"])
def test_error_at_some_reads(merges: Merges, call: str) -> None:
    assert reading_errors(merges, call, range(2, 40, 12)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("call", ["pread64", "preadv,preadv2"])
def test_error_at_every_read(merges: Merges, call: str) -> None:
    assert reading_errors(merges, call, range(1, 10_000)) > 10


@pytest.mark.slow
def test_killed_while_two_folders_are_exchanged(merges: Merges) -> None:
    merges.clear()
    merges.out.mkdir()
    (merges.out / "old.txt").write_text("old")
    ended = traced(merges, "renameat2:signal=SIGKILL:when=1", "--overwrite")
    assert ended.code == -9
    assert [entry.name for entry in merges.out.iterdir()] == ["old.txt"]
    assert merges.run("--overwrite", "-q").code == 0
    assert merges.files(merges.out) == merges.expected
