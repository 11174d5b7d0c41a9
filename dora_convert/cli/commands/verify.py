"""`dora-convert verify OUT --adapter ADAPTER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dora_convert.cli.console import note, printable, show_json, size
from dora_convert.cli.params import (
    PATH,
    base_option,
    examples,
    json_option,
    not_negative,
    read_options,
    reading_options,
)

__all__ = ["COMMAND"]


@click.command(
    "verify",
    epilog=examples(
        "dora-convert verify ./merged",
        "dora-convert verify ./merged --adapter ./adapter --base ./model",
        "dora-convert verify ./merged --adapter ./adapter --base ./model --all",
    ),
)
@click.argument("output", type=PATH)
@click.option(
    "-a",
    "--adapter",
    type=PATH,
    help="The adapter that was merged; without it the files' hashes are compared, and no more.",
)
@base_option
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    default=64,
    show_default=True,
    help="Recompute N rows of each of N modules, and compare N rows of every other tensor.",
)
@click.option("--all", "everything", is_flag=True, help="Recompute every row of every tensor.")
@click.option(
    "--tolerance",
    type=not_negative,
    metavar="NUMBER",
    default=1.0,
    show_default=True,
    help="Allow a difference of so many units in the last place.",
)
@json_option
@read_options
def _verify(
    output: Path,
    adapter: Path | None,
    base: Path | None,
    samples: int,
    tolerance: float,
    *,
    everything: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Compare an output with its hashes, and recompute a merged one in float64.

    OUTPUT is what merge, to-lora or convert wrote, with SHA256SUMS: a single byte that is another
    now is found. To recompute a merged checkpoint, pass --adapter, and --scale, --include,
    --exclude, --ignore, --axis and --transposed as they were then.
    """
    if base is not None and adapter is None:
        raise click.UsageError("--base goes with --adapter")
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
    for text in result.notes:
        note(f"Note: {printable(text)}")
    if result.hashed:
        click.echo(f"ok: {result.hashed} files have the sha256 that they were written with")
    if adapter is None:
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


COMMAND = _verify
