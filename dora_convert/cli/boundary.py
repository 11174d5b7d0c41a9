"""The one place where exceptions become messages and exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import click

from dora_convert import __version__
from dora_convert.errors import DoraConvertError

__all__ = ["guarded"]

_SHOWN = 8


class _Terminated(BaseException):
    """SIGTERM or SIGHUP arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def guarded(command: click.Command) -> NoReturn:
    """Run the command as a process: never a traceback, always the exit code that says what was."""
    for number in (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ())):
        signal.signal(number, _terminate)
    sys.exit(_run(command))


def _run(command: click.Command) -> int:  # noqa: PLR0911 - one return for each way to end
    try:
        command.main(standalone_mode=False)
        sys.stdout.flush()
    except DoraConvertError as error:
        _show(error)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("Interrupted. Nothing was left behind; the same command starts again.")
        return 130
    except _Terminated as error:
        _say("Stopped. Nothing was left behind; the same command starts again.")
        return 128 + error.number
    except BrokenPipeError:
        # The reader of a pipe left: nothing more to say to it, nor to complain of.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        _show_bug(error)
        return 1
    return 0


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    raise _Terminated(number)


def _show(error: DoraConvertError) -> None:
    if _wants_json():
        _say(
            json.dumps(
                {
                    "schema": "dora-convert/error/1",
                    "exit_code": error.exit_code,
                    "error": error.what,
                    "where": list(error.where),
                    "problems": list(error.problems),
                    "hint": error.hint,
                },
                ensure_ascii=False,
            )
        )
        return
    lines = [f"Error: {error.what}"]
    lines += [f"  {line}" for line in error.where]
    shown = error.problems if "--verbose" in sys.argv else error.problems[:_SHOWN]
    lines += [f"    {problem}" for problem in shown]
    if len(error.problems) > len(shown):
        lines.append(f"    ... {len(error.problems) - len(shown)} more (--verbose shows all)")
    if error.hint:
        lines.append(f"Hint: {error.hint}")
    _say("\n".join(lines))


def _show_bug(error: Exception) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"  # noqa: PTH119
    _say(
        f"Error: a bug in dora-convert {__version__}: {type(error).__name__}: {error} ({place})\n"
        "Hint: please report this line, with the command and the versions of torch and safetensors."
    )
    if "--verbose" in sys.argv:
        _say("".join(traceback.format_exception(error)))


def _wants_json() -> bool:
    # The options are not parsed yet when parsing fails, or another error comes first.
    return "--json" in sys.argv


def _say(text: str) -> None:
    click.echo(text, err=True)
