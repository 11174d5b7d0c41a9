"""The one place where exceptions become messages and exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import PurePath
from types import FrameType
from typing import NoReturn, TextIO

import click

from dora_convert import __version__
from dora_convert.cli.console import COMPLETE, PROGRAM, note, printable
from dora_convert.errors import DoraConvertError
from dora_convert.storage.oserrors import enough_memory

__all__ = ["guarded", "run"]

_SHOWN = 8
_REPORT = "Please report this line, with the command and the versions of torch and safetensors."


def guarded(command: click.Command) -> NoReturn:
    """Run the command as a process: never a traceback, always the exit code that says what was."""
    _handle_signals(_Stop())
    asked = os.environ.get(COMPLETE)
    if asked:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(command, {}, PROGRAM, COMPLETE, asked))
    try:
        code = run(command, sys.argv[1:])
    except _Stopped as error:  # while it was said how the command ended
        code = 128 + error.number
    # Python gives signals back their default meaning, death, some time before it is gone.
    _handle_signals(signal.SIG_IGN)
    _flush_notes()
    if code and any(thread.daemon for thread in threading.enumerate()):
        # One that is still sending cannot be ended, and Python may abort over it at its own end.
        os._exit(code)
    sys.exit(code)


def _flush_notes() -> None:
    """At exit Python would flush stderr itself, and turn what nobody can read into code 120."""
    if sys.stderr is not None:
        try:
            sys.stderr.flush()
        except OSError:
            _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """What the stream still holds would be tried again, and complained of, at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _handle_signals(handler: _Stop | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What is ignored already, as SIGHUP is under nohup, stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def run(command: click.Command, args: Sequence[str]) -> int:  # noqa: PLR0911 - one for each end
    """Run the command with these arguments; returns its exit code."""
    try:
        with (
            _log(args),
            enough_memory(),
            _held_stdout(),
            command.make_context(PROGRAM, list(args)) as context,
        ):
            command.invoke(context)
    except DoraConvertError as error:
        _show(error, args)
        return error.exit_code
    except click.ClickException as error:
        _show_usage(error, args)
        return error.exit_code
    except click.exceptions.Exit as error:  # --help and --version end so
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        return _show_stop(signal.SIGINT, args, _notes(error))
    except _Stopped as error:
        return _show_stop(error.number, args, _notes(error))
    except _StdoutError as error:
        _tell(args, 5, f"the result cannot be written to standard output: {error}")
        return 5
    except Exception as error:
        _show_bug(error, args)
        return 1
    return 0


class _Stopped(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Stop:
    """The handler. A second signal, which comes while all is put away, does not disturb that."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, number: int, _: FrameType | None) -> None:
        self._calls += 1
        if self._calls != 2:
            raise _Stopped(number)


class _Log(logging.Handler):
    """What should be known while a command runs, and not only at its end."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show it as the notes of a report are."""
        note(f"Note: {printable(record.getMessage())}")


@contextmanager
def _log(args: Sequence[str]) -> Iterator[None]:
    """Show the package's own log; a program that reads JSON finds the same in the report."""
    logger, handler = logging.getLogger("dora_convert"), _Log()
    if "--json" in args:
        yield
        return
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


class _StdoutError(Exception):
    """Standard output does not take the result."""


class _Held(io.TextIOWrapper):
    """Memory that says of itself what the stream says that will get it."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(io.BytesIO(), encoding=stream.encoding, errors="backslashreplace")
        self._is_terminal = stream.isatty()

    def isatty(self) -> bool:
        """Whether it ends up on a terminal."""
        return self._is_terminal


@contextmanager
def _held_stdout() -> Iterator[None]:
    """Keep what is printed until the end: a failure prints nothing, and writing has one place."""
    stream = sys.stdout
    if stream is None:  # closed by the caller, who wants nothing of it
        with redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            yield
        return
    held = _Held(stream)
    try:
        with redirect_stdout(held):
            yield
    except click.exceptions.Exit:
        _write(stream, held)
        raise
    _write(stream, held)


def _write(stream: TextIO, held: _Held) -> None:
    held.seek(0)  # flushes
    try:
        stream.buffer.write(held.buffer.read())
        stream.flush()
    except OSError as error:
        _discard(stream)
        # A reader that left early, such as `head`, has all that it wants.
        if not isinstance(error, BrokenPipeError):
            raise _StdoutError(os.strerror(error.errno or 0).lower()) from error


def _tell(
    args: Sequence[str],
    code: int,
    what: str,
    *,
    where: Sequence[str] = (),
    problems: Sequence[str] = (),
    hint: str = "",
) -> None:
    """Write a failure to stderr, as text or as one JSON object."""
    # Looked for by hand: the options are not known yet where reading them is what failed.
    if "--json" in args:
        body = {
            "schema": "dora-convert/error/1",
            "exit_code": code,
            "error": what,
            "where": list(where),
            "problems": list(problems),
            "hint": hint,
        }
        note(json.dumps(body))
        return
    shown = problems if "--verbose" in args else problems[:_SHOWN]
    lines = [f"Error: {printable(what)}"]
    # A path that the sentence ends with needs no line of its own.
    lines += [f"  {printable(line)}" for line in where if not what.endswith(f" {line}")]
    lines += [f"    {printable(problem)}" for problem in shown]
    if len(problems) > len(shown):
        lines.append(f"    ... {len(problems) - len(shown)} more (--verbose shows all)")
    if hint:
        lines.append(f"Hint: {printable(hint)}")
    note("\n".join(lines))


def _notes(error: BaseException) -> str:
    """What those whom the exception passed had to add: what is left of the work."""
    return " ".join(getattr(error, "__notes__", ()))


def _show(error: DoraConvertError, args: Sequence[str]) -> None:
    where, problems = error.where, error.problems
    hint = " ".join(text for text in (error.hint, _notes(error)) if text)
    _tell(args, error.exit_code, error.what, where=where, problems=problems, hint=hint)


def _show_usage(error: click.ClickException, args: Sequence[str]) -> None:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    if "--json" in args:
        _tell(args, error.exit_code, error.format_message(), hint=f"{path} --help")
    else:
        with suppress(OSError):
            error.show()


def _show_stop(number: int, args: Sequence[str], notes: str) -> int:
    name = "Interrupted" if number == signal.SIGINT else "Stopped"
    what = f"{name}. {notes or 'No half-written output is left; the same command starts again.'}"
    code = 128 + number
    if "--json" in args:
        _tell(args, code, what)
    else:
        note(what)
    return code


def _show_bug(error: Exception, args: Sequence[str]) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    what = f"a bug in dora-convert {__version__}: {type(error).__name__}: {error} ({place})"
    _tell(args, 1, what, hint=" ".join(text for text in (_REPORT, _notes(error)) if text))
    if "--verbose" in args and "--json" not in args:
        note("".join(traceback.format_exception(error)))
