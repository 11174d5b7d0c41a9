"""What is taken over from an interrupted run, what is not, and what is never touched."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cli.sandbox import digest
from tests.reliability.merges import Merges
from tests.reliability.nursery import Nursery, is_stopped


@pytest.fixture
def begun(merges: Merges) -> Merges:
    """Two of five shards are finished."""
    merges.clear()
    fault = merges.fault(3, calls=("fsync",), about=".safetensors.tmp")
    assert merges.run(fault=fault).code == -9
    assert len(merges.finished()) == 2
    return merges


def test_another_option(begun: Merges) -> None:
    before = digest(begun.place)
    ended = begun.run("--dtype", "bf16")
    assert ended.code == 5
    assert ended.err == (
        "Error: out.partial was begun by another command: --dtype was not given, now it is bf16\n"
        f"  {begun.partial}\n"
        "Hint: Pass --restart to begin anew, or repeat that command to finish it.\n"
    )
    assert digest(begun.place) == before
    assert begun.resume() == 2


def test_restart(begun: Merges) -> None:
    assert begun.run("--dtype", "bf16", "--restart").code == 0
    assert {entry.name for entry in begun.place.iterdir()} == {"out"}
    found = begun.files(begun.out)
    begun.clear()
    assert begun.run("--dtype", "bf16").code == 0
    assert begun.files(begun.out) == found != begun.expected


def test_options_that_do_not_matter(begun: Merges) -> None:
    assert begun.resume("--workers", "3", "--zero-rows", "keep") == 2


@pytest.mark.parametrize("name", ["base/tokenizer.json", "adapter/adapter_model.safetensors"])
def test_another_input(begun: Merges, name: str) -> None:
    file = begun.root / name
    before = file.stat()
    os.utime(file, ns=(0, before.st_mtime_ns + 1))
    try:
        ended = begun.run()
        assert ended.code == 5
        assert f"the input {file.name} was changed, or is another file" in ended.err
    finally:
        os.utime(file, ns=(0, before.st_mtime_ns))
    assert begun.resume() == 2


def test_inputs_that_moved(begun: Merges) -> None:
    """The same files in another place are the same."""
    moved = begun.box.base.rename(begun.root / "moved")
    try:
        command = ["moved" if part == begun.box.base else part for part in begun.command()]
        here = Path.cwd()
        assert moved.exists()
        command[command.index("moved")] = moved
        ended = begun.nursery.run(*command, "--json")
        assert here == Path.cwd()
    finally:
        moved.rename(begun.box.base)
    assert json.loads(ended.out)["kept"] == 2
    begun.check_promise()


@pytest.mark.parametrize("damage", ["flip", "cut", "link", "delete"])
def test_shard_that_is_not_what_it_was(begun: Merges, damage: str) -> None:
    name, other = sorted(begun.finished())
    file = begun.partial / "files" / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        os.truncate(file, len(data) - 1)
    else:
        file.unlink()
        if damage == "link":
            file.symlink_to(begun.box.weights)
    inode = (begun.partial / "files" / other).stat().st_ino
    assert begun.run().code == 0
    begun.check_promise()
    assert begun.files(begun.out) == begun.expected
    assert (begun.out / other).stat().st_ino == inode


@pytest.mark.parametrize("keep", [0, 1, 10, -1])
def test_journal_that_was_cut(begun: Merges, keep: int) -> None:
    """By a power failure, or by a full disk: the last line does not count."""
    journal = begun.partial / ".dora-convert"
    data = journal.read_bytes()
    journal.write_bytes(data[:keep])
    assert begun.run().code == 0
    assert begun.files(begun.out) == begun.expected


@pytest.mark.parametrize("command", ["to-lora", "convert"])
def test_another_command(begun: Merges, command: str) -> None:
    before = digest(begun.place)
    more = ["--rank", "4"] if command == "to-lora" else ["--to", "torchtune"]
    box = begun.box
    ended = begun.nursery.run(command, box.adapter, "-b", box.base, "-o", begun.out, *more)
    assert ended.code == 5
    assert "out.partial holds a merge that can still be finished" in ended.err
    assert digest(begun.place) == before
    assert begun.resume() == 2


def test_foreign_file_in_the_folder(begun: Merges) -> None:
    mine = begun.partial / "thesis.tex"
    mine.write_text("mine")
    ended = begun.run("--restart")
    assert ended.code == 5
    assert "was not made by this tool" in ended.err
    assert mine.read_text() == "mine"
    mine.unlink()
    assert begun.resume() == 2


def test_report(begun: Merges) -> None:
    ended = begun.run("--json")
    assert json.loads(ended.out)["kept"] == 2


# --------------------------------------------------------------------- inputs that change meanwhile


@pytest.mark.parametrize("point", [1, 3, 5])
@pytest.mark.parametrize(
    "name", ["base/model.safetensors", "base/tokenizer.json", "adapter/adapter_model.safetensors"]
)
def test_input_that_is_written_to(merges: Merges, name: str, point: int) -> None:
    file = merges.root / name
    os.utime(file)
    merges.clear()
    fault = merges.fault(
        point, "touch", calls=("fsync",), about=".safetensors.tmp", target=str(file)
    )
    ended = merges.run(fault=fault)
    assert ended.code == 3, ended
    assert f"Error: {file.name} was changed while it was read" in ended.err
    assert not list(merges.place.iterdir())


@pytest.mark.parametrize("point", [1, 4])
def test_input_that_is_cut_short(merges: Merges, point: int) -> None:
    """By pread, which says so; a file that is mapped would end the process by SIGBUS."""
    file = merges.box.weights
    data = file.read_bytes()
    merges.clear()
    fault = merges.fault(point, "cut", calls=("open",), about=".safetensors.tmp", target=str(file))
    try:
        ended = merges.run(fault=fault)
    finally:
        file.write_bytes(data)
    assert ended.code == 3, ended
    assert f"Error: {file.name} " in ended.err
    assert not list(merges.place.iterdir())


# --------------------------------------------------------------------------------- two at a time


def test_two_runs(merges: Merges, tmp_path: Path) -> None:
    """The second gives up at once and harms nothing, the first goes on; its lock dies with it."""
    fault = merges.fault(3, "SIGSTOP", calls=("fsync",), about=".safetensors.tmp")
    with Nursery(tmp_path) as other:
        for end in (signal.SIGCONT, signal.SIGKILL):
            merges.clear()
            first = merges.nursery.start(*merges.command("--workers", "1"), fault=fault)
            while len(merges.finished()) < 2 or not is_stopped(first):
                time.sleep(0.01)
            before = digest(merges.place)
            second = other.run(*merges.command())
            assert second.code == 5
            assert f"Error: another run (process {first}) is writing out" in second.err
            assert digest(merges.place) == before
            os.kill(first, end)
            code = merges.nursery.ended().code
            if end == signal.SIGKILL:
                assert code == -9
                assert merges.resume() == 2
            assert merges.files(merges.out) == merges.expected


# -------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_at_many_calls(merges: Merges, name: str) -> None:
    """One line, the usual exit code, and what is finished is kept."""
    kept = set()
    for point in range(3, 75, 12):
        merges.clear()
        ended = merges.run("-q", fault=merges.fault(point, name))
        finished = merges.finished()
        kept.add(len(finished))
        if ended.code:
            assert ended.code == 128 + getattr(signal, name)
            (line,) = ended.err.splitlines()
            if merges.out.exists():
                assert line.endswith("out is complete.")
            elif finished:
                assert line.endswith("kept in out.partial: the same command continues.")
            else:
                assert line.endswith("the same command starts again.")
                assert not list(merges.place.iterdir())
        merges.resume()
    assert len(kept) > 2
