"""`dora-convert convert ADAPTER --to FORMAT -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dora_convert.cli.console import note, printable, show_json, show_path, size
from dora_convert.cli.params import (
    PATH,
    dtype_option,
    examples,
    json_option,
    read_options,
    reading_options,
)
from dora_convert.cli.publishing import Sending, push_options, show_pushed

if TYPE_CHECKING:
    from dora_convert.core.tensors import DType

__all__ = ["COMMAND"]


@click.command(
    "convert",
    epilog=examples(
        "dora-convert convert ./adapter --to peft --output ./as-peft",
        "dora-convert convert ./adapter --to mlx --base ./model -o ./as-mlx",
    ),
)
@click.argument("adapter", type=PATH)
@click.option(
    "--to",
    "target",
    required=True,
    metavar="FORMAT",
    help="Layout to write: one that dora-convert formats lists, or a file that describes one.",
)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write; a new one.")
@click.option(
    "-b",
    "--base",
    type=PATH,
    metavar="MODEL",
    help="Folder of the base model, where it alone decides what the adapter means.",
)
@dtype_option
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")
@push_options
@json_option
@read_options
def _convert(
    adapter: Path,
    target: str,
    output: Path,
    base: Path | None,
    dtype: DType | None,
    *,
    overwrite: bool,
    as_json: bool,
    sending: Sending,
    **reading: Any,
) -> None:
    """Write an adapter in another trainer's layout, without loss.

    What the other layout cannot hold is refused, with the reason. OUTPUT appears complete, or not
    at all; what was interrupted begins anew.
    """
    from dora_convert import api

    report = api.convert(
        adapter,
        output,
        base=base,
        options=reading_options(**reading),
        how=api.ConvertOptions(format=target, dtype=dtype, overwrite=overwrite),
    )
    pushed = sending(report.output)
    if as_json:
        show_json("convert", report, pushed=pushed)
        return
    for text in report.notes:
        note(f"Note: {printable(text)}")
    note(
        f"{report.modules} modules from {report.source} to {report.format}: "
        f"{report.tensors} tensors, {size(report.nbytes)}"
    )
    show_path(report.output)
    show_pushed(pushed)


COMMAND = _convert
