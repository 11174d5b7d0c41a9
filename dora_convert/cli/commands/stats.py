"""`dora-convert stats BASE --text FILE -o FILE`."""

from __future__ import annotations

from pathlib import Path

import click

from dora_convert.cli.console import note, show_json, show_path, size
from dora_convert.cli.params import PATH, examples, json_option

__all__ = ["COMMAND"]


@click.command(
    "stats",
    epilog=examples(
        "dora-convert stats ./model --text calibration.txt --output model.stats.safetensors",
        "dora-convert to-lora ./adapter -b ./model --stats model.stats.safetensors -o ./lora",
    ),
)
@click.argument("base", type=PATH)
@click.option(
    "--text", type=PATH, required=True, help="UTF-8 text like the model's inputs; one text a line."
)
@click.option("-o", "--output", type=PATH, required=True, help="File to write; a new one.")
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    metavar="N",
    default=512,
    show_default=True,
    help="Cut each text to so many tokens.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@click.option("--verbose", is_flag=True, help="Show every problem, and where a bug is.")
@json_option
def _stats(
    base: Path,
    text: Path,
    output: Path,
    max_length: int,
    *,
    overwrite: bool,
    verbose: bool,  # the boundary looks at it
    as_json: bool,
) -> None:
    """Collect what the layers of a model see, for to-lora --stats.

    BASE is run on the text with transformers (pip install "dora-convert[calibrate]"). Kept are the
    second moments of each linear layer's inputs, nothing of the text itself.
    """
    from dora_convert import api

    report = api.collect_stats(base, text, output, length=max_length, overwrite=overwrite)
    if as_json:
        show_json("stats", report)
        return
    note(
        f"{report.modules} modules over {report.tokens} tokens of {report.texts} texts, "
        f"{size(report.nbytes)}, in {report.seconds:.1f} s"
    )
    show_path(report.output)


COMMAND = _stats
