"""`dora-convert plot ADAPTER -o FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dora_convert.cli.console import note, printable, progress, show_json, show_path
from dora_convert.cli.params import (
    PATH,
    base_option,
    examples,
    json_option,
    read_options,
    reading_options,
    workers_option,
)
from dora_convert.core.lora import DEFAULT_RANK
from dora_convert.core.pictures import PICTURES

__all__ = ["COMMAND"]


@click.command(
    "plot",
    epilog=examples(
        "dora-convert plot ./adapter --base ./model --output movement.svg",
        "dora-convert plot ./adapter -b ./model --kind spectrum -o spectrum.png",
    ),
)
@click.argument("adapter", type=PATH)
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="FILE",
    required=True,
    help="Picture to write, a new .png, .svg or .pdf.",
)
@base_option
@click.option(
    "--kind",
    type=click.Choice(list(PICTURES)),
    default=next(iter(PICTURES)),
    show_default=True,
    help="; ".join(f"{kind}: {what}" for kind, what in PICTURES.items()) + ".",
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    metavar="N",
    default=DEFAULT_RANK,
    show_default=True,
    help="The last rank of a spectrum.",
)
@workers_option
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@json_option
@read_options
def _plot(
    adapter: Path,
    output: Path,
    base: Path | None,
    kind: str,
    max_rank: int,
    workers: int | None,
    *,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Draw what an adapter does to its base.

    Needs matplotlib (pip install "dora-convert[plot]"). With --json, the numbers in the picture.
    """
    from dora_convert import api

    how = api.PlotOptions(kind=kind, max_rank=max_rank, workers=workers, overwrite=overwrite)
    options = reading_options(**reading)
    with progress("measuring", quiet=quiet or as_json) as listener:
        report = api.plot(adapter, output, base=base, options=options, how=how, listener=listener)
    if as_json:
        show_json("plot", report)
        return
    for text in report.notes:
        note(f"Note: {printable(text)}")
    show_path(report.output)


COMMAND = _plot
