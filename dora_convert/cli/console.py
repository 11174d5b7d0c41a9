"""What the user sees: results on stdout, all else on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from dora_convert.core.adapter import MagnitudeAxis

if TYPE_CHECKING:
    from dora_convert.api import ReadOptions
    from dora_convert.core.protocols import Listener

__all__ = ["note", "progress", "reading_options", "show_json", "size"]


def note(text: str) -> None:
    """A line for people, beside the result."""
    click.echo(text, err=True)


def show_json(kind: str, value: Any) -> None:
    """A report as one JSON object that names its schema."""
    body = {"schema": f"dora-convert/{kind}/1", **dataclasses.asdict(value)}
    click.echo(json.dumps(body, indent=2, ensure_ascii=False))


def size(nbytes: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def reading_options(axis: str | None, **others: Any) -> ReadOptions:
    """The shared options as the api takes them."""
    from dora_convert.api import ReadOptions

    others.pop("verbose")
    return ReadOptions(axis=MagnitudeAxis(axis) if axis else None, **others)


class _Lines:
    """A line for each finished shard: for logs, where a bar would be noise."""

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""

    def sealed(self, file: str) -> None:
        """See `Listener`."""
        note(f"wrote {file}")


class _Bar:
    """A rich progress bar of bytes."""

    def __init__(self, update: Any) -> None:
        self._update = update
        self._lock = threading.Lock()

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
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        from functools import partial

        from rich.console import Console
        from rich.progress import (
            DownloadColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TransferSpeedColumn,
        )

        columns = (SpinnerColumn(), TextColumn(label), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield _Bar(partial(bar.update, task))
