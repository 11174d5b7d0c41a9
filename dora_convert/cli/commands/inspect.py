"""`dora-convert inspect ADAPTER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dora_convert.cli.console import note, reading_options, show_json
from dora_convert.cli.params import base_option, json_option, read_options

__all__ = ["COMMAND"]


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@base_option
@click.option("--per-module", is_flag=True, help="A row for each module instead of each group.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads (default: one a core).")
@json_option
@read_options
def inspect(
    adapter: Path,
    base: Path | None,
    *,
    per_module: bool,
    workers: int | None,
    as_json: bool,
    **reading: Any,
) -> None:
    r"""Show what an adapter is and, with a base, whether it fits and what it does.

    Without --base only headers are read.

    \b
      dora-convert inspect ./adapter
      dora-convert inspect ./adapter --base ./model --per-module
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
        note(f"Note: {text}")


COMMAND = inspect
