"""`dora-convert merge ADAPTER -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dora_convert.cli.console import note, progress, reading_options, show_json, size
from dora_convert.cli.params import DTYPE, SIZE, base_option, json_option, read_options

if TYPE_CHECKING:
    from dora_convert.core.reports import MergeReport
    from dora_convert.core.tensors import DType

__all__ = ["COMMAND"]

_SAMPLES = {"sample": 16, "all": None, "none": 0}


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="A new folder."
)
@base_option
@click.option("--dtype", type=DTYPE, help="Type of all plain floats (default: as in the base).")
@click.option(
    "--max-shard-size", type=SIZE, metavar="SIZE", help="Such as 5GB (default: the base's shards)."
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads (default: one a core).")
@click.option(
    "--zero-rows",
    type=click.Choice(["error", "keep"]),
    default="error",
    show_default=True,
    help="Rows that are zero in the base though they have a magnitude.",
)
@click.option(
    "--verify",
    "check",
    type=click.Choice(list(_SAMPLES)),
    default="sample",
    show_default=True,
    help="How much of the result is recomputed before it appears.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Check everything, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@json_option
@read_options
def merge(
    adapter: Path,
    output: Path,
    base: Path | None,
    dtype: DType | None,
    max_shard_size: int | None,
    workers: int | None,
    zero_rows: str,
    check: str,
    *,
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    r"""Merge an adapter into its base model.

    OUTPUT appears complete, or not at all. Its path is printed when it is done.

    \b
      dora-convert merge ./adapter --base ./model --output ./merged
      dora-convert merge ./adapter -b ./model -o ./merged --dtype bf16 --max-shard-size 5GB
    """
    from dora_convert import api

    how = api.MergeOptions(
        dtype=dtype,
        max_shard_size=max_shard_size,
        workers=workers,
        keep_zero_rows=zero_rows == "keep",
        overwrite=overwrite,
        dry_run=dry_run,
        samples=_SAMPLES[check],
    )
    options = reading_options(**reading)
    with progress("merging", quiet=quiet or as_json) as listener:
        report = api.merge(adapter, output, base=base, options=options, how=how, listener=listener)
    if as_json:
        show_json("merge", report)
        return
    for text in report.notes:
        note(f"Note: {text}")
    if not quiet:
        _summary(report, dry_run=dry_run)
    if not dry_run:
        click.echo(report.output)


def _summary(report: MergeReport, *, dry_run: bool) -> None:
    verb = "would merge" if dry_run else "merged"
    note(
        f"{verb} {report.merged} tensors, replaced {report.replaced}, kept {report.untouched}: "
        f"{size(report.nbytes)} in {report.shards} shard{'s' * (report.shards != 1)}"
    )
    if dry_run:
        note(f"files: {', '.join(report.files)}")
        return
    took = report.seconds["merge"]
    rate = f", {size(report.nbytes / took)}/s" if took else ""
    note(
        f"time: plan {report.seconds['plan']:.2f} s, merge {took:.2f} s{rate}, "
        f"disk {report.seconds['sync']:.2f} s, verify {report.seconds.get('verify', 0):.2f} s"
    )
    checked = report.verification
    if checked is not None:
        text = f"verified: {checked.rows} rows of {checked.modules} modules recomputed in float64"
        if checked.rounding is not None:
            text += f"; rounding lost {checked.rounding.loss:.2%} of the update"
        note(text)


COMMAND = merge
