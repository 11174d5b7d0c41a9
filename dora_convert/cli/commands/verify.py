"""`dora-convert verify OUT --adapter ADAPTER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dora_convert.cli.console import reading_options, show_json, size
from dora_convert.cli.params import base_option, json_option, read_options

__all__ = ["COMMAND"]


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("-a", "--adapter", type=click.Path(path_type=Path), required=True)
@base_option
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Modules recomputed, and rows of each.",
)
@click.option("--all", "everything", is_flag=True, help="Recompute every row of every tensor.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Allowed difference, in units of the last place.",
)
@json_option
@read_options
def verify(
    output: Path,
    adapter: Path,
    base: Path | None,
    samples: int,
    tolerance: float,
    *,
    everything: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    r"""Recompute a merged checkpoint in float64 and compare.

    \b
      dora-convert verify ./merged --adapter ./adapter --base ./model --all
    """
    from dora_convert import api

    result = api.verify(
        output,
        adapter=adapter,
        base=base,
        options=reading_options(**reading),
        samples=None if everything else samples,
        tolerance=tolerance,
    )
    if as_json:
        show_json("verify", result)
        return
    click.echo(
        f"ok: {result.tensors} tensors as planned, {result.rows} rows of {result.modules} modules "
        f"recomputed in float64, {size(result.compared_bytes)} compared bit for bit"
    )
    if result.rounding is not None:
        click.echo(
            f"rounding lost {result.rounding.loss:.2%} of the update; "
            f"{result.rounding.kept:.1%} of it is kept"
        )


COMMAND = verify
