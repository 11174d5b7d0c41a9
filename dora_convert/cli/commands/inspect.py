"""`dora-convert inspect ADAPTER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dora_convert.cli.console import note, printable, show_json
from dora_convert.cli.params import (
    PATH,
    examples,
    json_option,
    read_options,
    reading_options,
    workers_option,
)

__all__ = ["COMMAND"]


@click.command(
    "inspect",
    epilog=examples(
        "dora-convert inspect ./adapter",
        "dora-convert inspect ./adapter --base ./model --per-module",
    ),
)
@click.argument("adapter", type=PATH)
@click.option(
    "-b",
    "--base",
    type=PATH,
    metavar="MODEL",
    help="Base model to measure it on: a folder, or org/name[@revision] on the Hub.",
)
@click.option("--per-module", is_flag=True, help="Show each module instead of each kind of module.")
@click.option(
    "--plot",
    "picture",
    type=PATH,
    metavar="FILE",
    help="Draw it too, into a new .png, .svg or .pdf: as plot, which has more kinds of pictures.",
)
@click.option("--overwrite", is_flag=True, help="Replace the FILE of --plot if it exists.")
@workers_option
@json_option
@read_options
def _inspect(
    adapter: Path,
    base: Path | None,
    picture: Path | None,
    workers: int | None,
    *,
    per_module: bool,
    overwrite: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Show what an adapter is and, with --base, what it does.

    With --base it is checked that the adapter fits, and measured how far it moves the weights.
    Without, only the headers of the adapter are read.
    """
    from dora_convert import api

    options = reading_options(**reading)
    report = api.inspect(
        adapter,
        base=base,
        options=options,
        per_module=per_module,
        picture=picture,
        overwrite=overwrite,
        workers=workers,
    )
    if as_json:
        show_json("inspect", report)
        return
    from dora_convert.cli.tables import show_inspection

    show_inspection(report)
    for text in report.notes:
        note(f"Note: {printable(text)}")


COMMAND = _inspect
