"""The boundary in this process: signals, standard output and the terminal, made up."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import click
import pytest
import torch

from dora_convert.cli import boundary, cli, main
from dora_convert.cli.boundary import run as boundary_run
from dora_convert.cli.console import printable, show_json, size
from dora_convert.cli.tables import show_inspection
from dora_convert.core.reports import Group, Inspection, MergeReport
from dora_convert.errors import OutputError
from tests.cli.sandbox import MODULES, Result, Sandbox

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Result]]:
    """Run the entry point, then give the signals back their handlers."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    # Whoever runs the tests may ignore some, as nohup does.
    for number in NUMBERS:
        signal.signal(number, signal.default_int_handler)

    def start(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["dora-convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, captured.out, captured.err)

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


def instead(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Let `inspect` do something else."""
    monkeypatch.setattr("dora_convert.api.inspect", lambda *_, **__: do())


# -------------------------------------------------------------------------------------- signals


def test_entry_point(start: Callable[..., Result]) -> None:
    assert start("formats").code == 0
    assert start("merg").code == 2


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Stopped")],
)
def test_signal(
    start: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    word: str,
) -> None:
    instead(monkeypatch, lambda: signal.raise_signal(number))
    result = start("inspect", "x")
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"{word}. ")
    assert len(result.err.splitlines()) == 1
    # Nothing that comes now, while Python ends, may change the exit code.
    assert {signal.getsignal(n) for n in NUMBERS} == {signal.SIG_IGN}


def test_signal_as_json(start: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    result = start("inspect", "x", "--json")
    assert json.loads(result.err)["exit_code"] == result.code == 143


def test_second_signal_lets_the_cleaning_end_and_a_third_does_not(
    start: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            steps.append("cleaned")
            signal.raise_signal(signal.SIGINT)
            steps.append("never reached")

    instead(monkeypatch, work)
    assert start("inspect", "x").code == 130
    assert steps == ["cleaned"]


def test_signal_while_an_error_is_told(
    start: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "note", lambda _: signal.raise_signal(signal.SIGTERM))
    assert start("inspect", "/nowhere").code == 143


def test_ignored_signals_stay_ignored(
    start: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    instead(monkeypatch, lambda: signal.raise_signal(signal.SIGHUP) or 1 / 0)
    assert start("inspect", "x").code == 1  # it came as far as the bug


def test_abort(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def abort() -> None:
        raise click.Abort

    instead(monkeypatch, abort)
    assert run("inspect", "x").code == 130


def test_completion_is_asked_for(
    start: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_DORA_CONVERT_COMPLETE", "fish_complete")
    monkeypatch.setenv("COMP_WORDS", "dora-convert ver")
    monkeypatch.setenv("COMP_CWORD", "ver")
    result = start()
    assert result.code == 0
    assert "verify" in result.out


# --------------------------------------------------------------------------------------- stdout


class Stream(io.TextIOWrapper):
    """A standard output that fails."""

    def __init__(self, error: OSError | None, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self.error = error
        self.spare = os.open(os.devnull, os.O_WRONLY)

    def flush(self) -> None:
        if self.error is not None:
            raise self.error
        super().flush()

    def fileno(self) -> int:
        return self.spare


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["formats"]], ids=" ".join)
@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(errno.ENOSPC, "full"), 5), (OSError(errno.EIO, "broken"), 5), (BrokenPipeError(), 0)],
    ids=["full", "broken", "closed"],
)
def test_stdout_that_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    error: OSError,
    code: int,
) -> None:
    stream = Stream(error)
    monkeypatch.setattr(sys, "stdout", stream)
    assert boundary_run(cli, arguments) == code
    shown = capsys.readouterr().err
    assert shown.count("cannot be written to standard output") == (code == 5)
    stream.error = None
    os.close(stream.spare)


def test_no_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert boundary_run(cli, ["formats"]) == 0
    assert boundary_run(cli, ["merg"]) == 2
    assert "merg" in capsys.readouterr().err


def test_stdout_that_lacks_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(None, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    report = inspection(adapter="caf\xe9 \u0142")
    instead(monkeypatch, lambda: report)
    assert boundary_run(cli, ["inspect", "x"]) == 0
    stream.seek(0)
    assert stream.buffer.read().startswith(b"adapter    caf\xe9 \\u0142\n")
    os.close(stream.spare)


def test_failure_prints_nothing(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        click.echo("half a result")
        raise OutputError("no", where=("line one", "line\ntwo"), hint="do it")

    instead(monkeypatch, work)
    result = run("inspect", "x")
    assert (result.code, result.out) == (5, "")
    assert result.err == "Error: no\n  line one\n  line\\ntwo\nHint: do it\n"


def test_place_that_was_said_already(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        raise OutputError("it is not at ./x", where=("./x", "x"))

    instead(monkeypatch, work)
    assert run("inspect", "x").err == "Error: it is not at ./x\n  x\n"


# ------------------------------------------------------------------------------------- terminal


def inspection(**others: object) -> Inspection:
    group = Group(
        name="model.layers.31.self_attn.q_proj",
        modules=1,
        kinds=("DoRA", "LoRA"),
        ranks=(4, 16),
        scalings=(),
        axes=("out",),
        shapes=((1, 2), (3, 4), (5, 6)),
        dtypes=("BF16",),
        nbytes=2_500_000,
    )
    values = {
        "adapter": "here",
        "format": "peft",
        "kind": "DoRA",
        "base_model": None,
        "base": None,
        "modules": 1,
        "nbytes": 5,
        "groups": (group,),
        "replaced": tuple("abcdef"),
        "token_rows": 7,
        "total": None,
        "notes": (),
    }
    return Inspection(**(values | others))  # type: ignore[arg-type]


def test_everything_that_an_adapter_can_hold(capsys: pytest.CaptureFixture[str]) -> None:
    show_inspection(inspection())
    assert capsys.readouterr().out.splitlines() == [
        "adapter    here",
        "format     peft, DoRA",
        "trained on (the adapter does not say)",
        "modules    1, 5 B",
        "replaced   6 tensors trained whole: a, b, c, d ...",
        "tokens     7 rows of the embedding trained whole",
        "",
        "group                             kind        axis  dtype  out x in      "
        "   rank  scaling  modules    size",
        "model.layers.31.self_attn.q_proj  DoRA, LoRA  out   BF16   1x2, 3x4 ...  "
        "4 to 16                 1  2.5 MB",
    ]
    show_inspection(inspection(groups=(), replaced=("a",)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "replaced   1 tensors trained whole: a",
        "tokens     7 rows of the embedding trained whole",
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_tables_on_a_terminal(
    box: Sandbox,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    result = run("inspect", box.adapter, "-b", box.base, "--per-module")
    assert result.out.count("\x1b[1m") == 2  # the heads of both tables
    plain = click.unstyle(result.out)
    tables = plain.split("\n\n")[1:3]
    for line in (line for table in tables for line in table.splitlines()):
        assert len(line) <= max(width, 88)
    for path in MODULES:
        assert plain.count(path[-19:]) == 2  # `0.self_attn.q_proj`: it is still known which


def test_bar_on_a_terminal(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = box.merge()
    assert result.code == 0
    assert "merged model.safetensors" not in result.err
    assert "merged 4 tensors" in result.err


# ------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (7e15, "7000.0 TB")],
)
def test_size(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_printable() -> None:
    assert printable("caf\xe9 [a] ok") == "caf\xe9 [a] ok"
    assert printable("a\x1b[31m\n\u202e\udcff") == "a\\x1b[31m\\n\\u202e\\udcff"


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = MergeReport(
        output="caf\xe9",
        adapter="a",
        base="b",
        format="peft",
        merged=1,
        replaced=0,
        untouched=0,
        shards=1,
        nbytes=3,
        files=("x",),
        notes=(),
        seconds={"a": torch.inf, "b": 1.5},
        dry_run=False,
        verification=None,
    )
    show_json("merge", report)
    out = capsys.readouterr().out
    assert out.isascii()
    body = json.loads(out)
    assert body["schema"] == "dora-convert/merge/1"
    assert body["output"] == "caf\xe9"
    assert body["seconds"] == {"a": None, "b": 1.5}
