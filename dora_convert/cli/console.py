"""What the user sees: results on stdout, all else on stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dora_convert.core.protocols import Listener

__all__ = [
    "COMPLETE",
    "PROGRAM",
    "note",
    "printable",
    "progress",
    "show_json",
    "show_path",
    "size",
]

PROGRAM = "dora-convert"
COMPLETE = "_DORA_CONVERT_COMPLETE"  # set by the completion script when it asks


def note(text: str) -> None:
    """A line for people, beside the result; where nobody can read it, work goes on."""
    with suppress(OSError):
        click.echo(text, err=True)


def printable(text: str) -> str:
    """Foreign text with its control characters escaped, so that it cannot steer the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show_path(path: str) -> None:
    """The path that a command has made, byte for byte as it is, whatever the encoding."""
    click.echo(os.fsencode(path))


def show_json(kind: str, value: Any, **more: Any) -> None:
    """A report as one JSON object that names its schema; a number that is none becomes null.

    `more` are reports on what else was done, by key; None is left out.
    """
    body = {"schema": f"dora-convert/{kind}/1", **_strict(dataclasses.asdict(value))}
    body |= {key: _strict(dataclasses.asdict(item)) for key, item in more.items() if item}
    # In ASCII, since stdout may have any encoding.
    click.echo(json.dumps(body, indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(nbytes: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


class _Lines:
    """A line for each finished shard: for logs, where a bar would be noise."""

    def started(self, nbytes: int) -> None:
        """See `Listener`."""

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""

    def sealed(self, file: str) -> None:
        """See `Listener`."""
        note(f"merged {file}")


class _Bar:
    """A rich progress bar of bytes."""

    def __init__(self, update: Any) -> None:
        self._update = update
        self._lock = threading.Lock()

    def started(self, nbytes: int) -> None:
        """See `Listener`."""
        self._update(total=nbytes)

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""
        with self._lock:
            self._update(advance=nbytes)

    def sealed(self, file: str) -> None:
        """See `Listener`."""


@contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Listener]:
    """A listener that shows how far a run is: a bar on a terminal, lines elsewhere."""
    if quiet:
        from dora_convert.api import Silent

        yield Silent()
    elif sys.stderr is None or not sys.stderr.isatty():
        yield _Lines()
    else:
        from functools import partial

        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            SpinnerColumn(),
            TextColumn(label),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield _Bar(partial(bar.update, task))
