"""What only a process of its own shows: imports, signals, streams, locales."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.sandbox import Sandbox, digest

PROGRAM = [sys.executable, "-m", "dora_convert"]

# Runs the program with an engine that takes its time, and says when it has begun.
SLOW = """
import pathlib, sys, time
from dora_convert.execution import run as engine
do_unit, marker = engine.do_unit, pathlib.Path(sys.argv.pop(1))
def slow(*args):
    found = do_unit(*args)
    marker.touch()
    time.sleep(0.1)
    return found
engine.do_unit = slow
from dora_convert.cli import main
main()
"""


def process(
    *arguments: object, variables: Mapping[str, str] | None = None, **others: Any
) -> subprocess.CompletedProcess[bytes]:
    command = [*PROGRAM, *(os.fsencode(str(a)) for a in arguments)]
    environment = os.environ | (variables or {})
    if "stdout" not in others:
        others["stdout"] = subprocess.PIPE
    return subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, check=False, timeout=120, **others
    )


def merge_arguments(box: Sandbox) -> list[str]:
    return ["merge", str(box.adapter), "-b", str(box.base), "-o", str(box.out)]


# -------------------------------------------------------------------------------------- imports


@pytest.fixture
def poor(tmp_path: Path) -> Mapping[str, str]:
    """An environment where all that is slow to import cannot be."""
    folder = tmp_path / "poor"
    folder.mkdir()
    slow = ("torch", "numpy", "rich", "safetensors", "huggingface_hub", "transformers")
    for name in (*slow, "matplotlib"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    paths = (str(folder), os.environ.get("PYTHONPATH", os.getcwd()))  # noqa: PTH109
    return {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["merge", "--help"],
        ["plot", "--help"],
        ["formats"],
        ["completion", "zsh"],
        ["merg"],
    ],
    ids=" ".join,
)
def test_light_commands(poor: Mapping[str, str], arguments: Sequence[str]) -> None:
    done = process(*arguments, variables=poor)
    assert done.returncode == (2 if arguments == ["merg"] else 0), done
    assert b"was imported" not in done.stderr


def test_the_list_of_commands_imports_no_machinery() -> None:
    """Planning is half of what a command imports, and its plug-ins' entry points a fifth more."""
    code = """
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_module("dora_convert", run_name="__main__")
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    imported = set(done.stderr.split())
    assert "dora_convert.cli.commands.to_lora" in imported
    heavy = {"dora_convert.loras", "dora_convert.planning.planner", "importlib.metadata"}
    assert not imported & heavy


def test_reading_headers_is_light(box: Sandbox, poor: Mapping[str, str]) -> None:
    done = process("inspect", box.adapter, variables=poor)
    assert (done.returncode, done.stderr) == (0, b"")
    # The trap works: to measure needs torch.
    done = process("inspect", box.adapter, "--base", box.base, variables=poor)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"torch was imported" in done.stderr


def test_help_is_quick() -> None:
    def seconds() -> float:
        begun = time.monotonic()
        assert process("--help").returncode == 0
        return time.monotonic() - begun

    assert min(seconds() for _ in range(3)) < 1


# -------------------------------------------------------------------------------------- signals


@pytest.fixture
def interrupted(box: Sandbox) -> Callable[..., tuple[int, str]]:
    """Send signals to a merge that is under way; its exit code and what it said."""

    def interrupted(*numbers: int, ignored: int | None = None) -> tuple[int, str]:
        marker = box.root / "begun"

        def prepare() -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

        with subprocess.Popen(
            [sys.executable, "-c", SLOW, str(marker), *merge_arguments(box), "--workers", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,  # noqa: PLW1509
        ) as running:
            while not marker.exists():
                assert running.poll() is None, running.communicate()
                time.sleep(0.01)
            assert (box.root / "out.partial").exists()
            for number in numbers:
                running.send_signal(number)
                time.sleep(0.05)
            out, err = running.communicate(timeout=60)
        marker.unlink()
        assert bool(out) == (running.returncode == 0)
        return running.returncode, err

    return interrupted


@pytest.mark.parametrize(
    ("numbers", "code", "word"),
    [
        ([signal.SIGINT], 130, "Interrupted"),
        ([signal.SIGTERM], 143, "Stopped"),
        ([signal.SIGHUP], 129, "Stopped"),
        ([signal.SIGINT, signal.SIGINT], 130, "Interrupted"),
        ([signal.SIGTERM, signal.SIGINT], 143, "Stopped"),
    ],
    ids=["int", "term", "hup", "int-int", "term-int"],
)
def test_signals(
    box: Sandbox,
    interrupted: Callable[..., tuple[int, str]],
    numbers: Sequence[int],
    code: int,
    word: str,
) -> None:
    before = digest(box.root)
    found, err = interrupted(*numbers)
    assert found == code, err
    (line,) = err.splitlines()
    assert line.startswith(f"{word}. ")
    assert digest(box.root) == before
    assert {entry.name for entry in box.root.iterdir()} == {"base", "adapter"}


def test_hangup_under_nohup(box: Sandbox, interrupted: Callable[..., tuple[int, str]]) -> None:
    code, _ = interrupted(signal.SIGHUP, ignored=signal.SIGHUP)
    assert code == 0
    assert (box.out / "model.safetensors").exists()


# -------------------------------------------------------------------------------------- streams


def test_reader_that_left(box: Sandbox) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = process(*merge_arguments(box), "--quiet", stdout=writer)
        help_page = process("--help", stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (box.out / "model.safetensors").exists()
    assert (help_page.returncode, help_page.stderr) == (0, b"")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["formats"], ["formats", "--json"]], ids=" ".join
)
def test_stdout_that_is_full(arguments: Sequence[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = process(*arguments, stdout=full)
    assert done.returncode == 5
    (line,) = done.stderr.decode().splitlines()
    assert "cannot be written to standard output: no space left on device" in line


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stderr_that_is_full(box: Sandbox, unbuffered: str) -> None:
    """Notes are lost then, and nothing else; also those that Python itself still holds."""
    command = [*PROGRAM, *merge_arguments(box)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:

        def run(*words: str) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(
                words, stdout=subprocess.PIPE, stderr=full, check=False, env=environment
            )

        done = run(*command)
        assert (done.returncode, done.stdout) == (0, os.fsencode(f"{box.out}\n"))
        assert run(*PROGRAM, "merg").returncode == 2


def test_no_streams_at_all() -> None:
    for arguments in ("formats", "merg"):
        shell = f'exec "$@" {arguments} >&- 2>&-'
        done = subprocess.run(["sh", "-c", shell, "sh", *PROGRAM], check=False)
        assert done.returncode == (0 if arguments == "formats" else 2)


def read_all(terminal: int, shown: list[bytes]) -> None:
    """What is shown, until the last who writes to it is gone."""
    with contextlib.suppress(OSError):  # as a terminal says that
        while piece := os.read(terminal, 1 << 16):
            shown.append(piece)


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_terminal(box: Sandbox, term: str) -> None:
    """A bar on a terminal, which is gone in the end; no control characters on a dumb one."""
    ours, theirs = pty.openpty()
    pieces: list[bytes] = []
    # Meanwhile: a terminal holds a few kB, and who writes more waits.
    reader = threading.Thread(target=read_all, args=(ours, pieces))
    reader.start()
    try:
        command = [*PROGRAM, *merge_arguments(box)]
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
        environment |= {"TERM": term, "COLUMNS": "100"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=theirs, env=environment, check=False
        )
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    shown = b"".join(pieces).decode()
    assert (done.returncode, done.stdout) == (0, os.fsencode(f"{box.out}\n"))
    assert ("\x1b" in shown) == (term != "dumb")
    assert "merged 4 tensors" in shown


# -------------------------------------------------------------------------------------- locales


CAFE = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
LOCALES = [
    {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("variables", LOCALES, ids=["ascii", "c"])
def test_paths_in_any_locale(box: Sandbox, variables: Mapping[str, str]) -> None:
    for name in ("base", "adapter"):
        (box.root / name).rename(box.root / f"{name} {CAFE}")
    box.base, box.adapter = (box.root / f"{name} {CAFE}" for name in ("base", "adapter"))
    box.out = box.root / f"out {CAFE}"
    done = process(*merge_arguments(box), "--quiet", variables=variables)
    # What is printed is the path itself, so that a script can use it.
    assert (done.returncode, done.stdout) == (0, os.fsencode(box.out) + b"\n"), done.stderr
    again = process(*merge_arguments(box), variables=variables)
    assert again.returncode == 5
    assert b"exists already" in again.stderr
    shown = process("inspect", box.adapter, variables=variables)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b"adapter caf" in shown.stdout
    report = process("inspect", box.adapter, "--json", variables=variables)
    assert json.loads(report.stdout)["adapter"].encode(errors="surrogateescape") == os.fsencode(
        box.adapter
    )


def test_path_that_is_not_text(box: Sandbox) -> None:
    box.out = box.root / "out \udcff"  # how Python has a byte that is not UTF-8
    done = process(*merge_arguments(box), "--quiet")
    assert (done.returncode, done.stdout) == (5, b"")
    assert b"is not valid UTF-8" in done.stderr
    assert not box.out.exists()
