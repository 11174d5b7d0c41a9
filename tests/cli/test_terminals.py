"""Every command where the streams, the terminal and the locale are not what one hopes for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import TypeAlias

import pytest

from dora_convert.cli import cli
from tests.cli.sandbox import Sandbox
from tests.cli.test_process import CAFE, PROGRAM

Arguments: TypeAlias = Callable[[Sandbox], Sequence[object]]

# Nothing listens at this address, so that nothing can be sent.
ODD = {
    "LANG": "C",
    "LC_ALL": "POSIX",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "TERM": "dumb",
    "COLUMNS": "30",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_TOKEN": "hf_canary0123456789",
}
# What each command ends with where nothing but its surroundings is wrong.
COMMANDS: dict[str, tuple[Arguments, int]] = {
    "bench": (lambda box: [box.adapter, "-b", box.base], 0),
    "completion": (lambda _: ["bash"], 0),
    "convert": (lambda box: [box.adapter, "--to", "peft", "-o", box.out], 0),
    "formats": (lambda _: [], 0),
    "inspect": (lambda box: [box.adapter, "-b", box.base, "--per-module"], 0),
    "merge": (lambda box: [box.adapter, "-b", box.base, "-o", box.out], 0),
    "plot": (
        lambda box: [box.adapter, "-b", box.base, "-o", box.root / "p.svg", "--overwrite"],
        0,
    ),
    "push": (lambda box: [box.adapter, "someone/something"], 6),
    "stats": (lambda box: [box.base, "--text", box.root / "absent", "-o", box.root / "s"], 3),
    "to-lora": (lambda box: [box.adapter, "-b", box.base, "-o", box.out, "--rank", "4"], 0),
    "verify": (lambda box: [box.root / "absent"], 3),
}
# Those that print a result; the others print a path, or nothing that is a result.
TELLING = ("bench", "completion", "formats", "inspect")


def run(box: Sandbox, command: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """With no terminal at all: a session of its own, and nothing to read from."""
    arguments, _ = COMMANDS[command]
    words = [*prefix, *PROGRAM, command, *(os.fsencode(str(a)) for a in arguments(box))]
    return subprocess.run(
        words,
        env=os.environ | ODD,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        start_new_session=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def odd(box: Sandbox) -> Sandbox:
    """Its folders have names that are not ASCII, and so has what the adapter says."""
    for name in ("base", "adapter"):
        (box.root / name).rename(box.root / f"{name} {CAFE}")
    box.base, box.adapter = (box.root / f"{name} {CAFE}" for name in ("base", "adapter"))
    box.out = box.root / f"out {CAFE}"
    box.configure(box.adapter, base_model_name_or_path=f"{CAFE}/\ud800\x1b[2J")
    return box


def check(done: subprocess.CompletedProcess[str], *codes: int) -> None:
    assert done.returncode in codes, done
    assert "Traceback" not in done.stderr
    assert "a bug in" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert ODD["HF_TOKEN"] not in done.stdout + done.stderr


def test_no_command_is_forgotten() -> None:
    assert set(COMMANDS) == set(cli.list_commands(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_terminal_and_no_locale(odd: Sandbox, command: str) -> None:
    done = run(odd, command)
    code = COMMANDS[command][1]
    check(done, code)
    assert bool(done.stdout) == (code == 0)
    if command in ("merge", "convert", "to-lora"):
        assert os.fsencode(done.stdout.splitlines()[-1]) == os.fsencode(odd.out)
        assert odd.out.is_dir()
    if code:
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("Error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_standard_output_that_is_full_or_closed(odd: Sandbox, command: str) -> None:
    """A result that nobody can get is a failure; work that is done stays done."""
    code = COMMANDS[command][1]
    full = run(odd, command, ["sh", "-c", 'exec "$@" >/dev/full', "sh"])
    check(full, code or 5)
    if code == 0:
        assert "cannot be written to standard output: no space left on device" in full.stderr
    made = odd.out.exists()
    assert made == (command in ("merge", "convert", "to-lora"))
    if made:
        odd.out.rename(odd.root / "first")
    closed = run(odd, command, ["sh", "-c", 'exec "$@" >&-', "sh"])
    check(closed, code)
    assert odd.out.exists() == made


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_to_write_to_at_all(odd: Sandbox, command: str) -> None:
    done = run(odd, command, ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"])
    assert done.returncode == COMMANDS[command][1]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "completion"])
def test_errors_as_json_are_ascii(odd: Sandbox, command: str) -> None:
    """Whatever the locale, a program can read what went wrong."""
    done = subprocess.run(
        [*PROGRAM, command, os.fsencode(str(odd.root / "absent")), "--json", "--no-such-option"],
        env=os.environ | ODD,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert json.loads(done.stderr.decode("ascii"))["exit_code"] == 2
