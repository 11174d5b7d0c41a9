"""`dora-convert inspect ADAPTER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dora_convert.cli.console import note, printable, show_json
from dora_convert.cli.params import (
    PATH,
    base_option,
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
@base_option
@click.option("--per-module", is_flag=True, help="Show each module instead of each kind of module.")
@workers_option
@json_option
@read_options
def _inspect(
    adapter: Path,
    base: Path | None,
    *,
    per_module: bool,
    workers: int | None,
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
        adapter, base=base, options=options, per_module=per_module, workers=workers
    )
    if as_json:
        show_json("inspect", report)
        return
    from dora_convert.cli.tables import show_inspection

    show_inspection(report)
    for text in report.notes:
        note(f"Note: {printable(text)}")


COMMAND = _inspect
