"""`dora-convert merge ADAPTER -o OUT`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dora_convert.cli.console import note, printable, progress, show_json, size
from dora_convert.cli.params import (
    PATH,
    base_option,
    dtype_option,
    examples,
    json_option,
    nbytes,
    number,
    read_options,
    reading_options,
    workers_option,
)

if TYPE_CHECKING:
    from dora_convert.core.reports import MergeReport, Survival
    from dora_convert.core.tensors import DType

__all__ = ["COMMAND"]

_SAMPLES = {"sample": 16, "all": None, "none": 0}
_SWALLOWED = 0.5  # share of an update below which a person should hear of it


@click.command(
    "merge",
    epilog=examples(
        "dora-convert merge ./adapter --base ./model --output ./merged",
        "dora-convert merge ./adapter -b ./model -o ./merged --max-shard-size 5GB",
    ),
)
@click.argument("adapter", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write; a new one.")
@base_option
@dtype_option
@click.option(
    "--max-shard-size",
    type=nbytes,
    metavar="SIZE",
    help="Write files of at most SIZE, such as 5GB; by default as in the base.",
)
@click.option(
    "--quantize",
    metavar="SCHEME",
    help="Store the weights quantised, as nf4, w4a16 or fp8_dynamic; formats lists all.",
)
@click.option(
    "--keep-dense",
    multiple=True,
    metavar="GLOB",
    help="With --quantize: modules that stay dense. Can be repeated.",
)
@click.option(
    "--min-survival",
    type=number,
    metavar="SHARE",
    help="With --quantize: fail if less than SHARE (0 to 1) of a module's update is kept.",
)
@workers_option
@click.option(
    "--zero-rows",
    type=click.Choice(["error", "keep"]),
    default="error",
    show_default=True,
    help="Refuse rows that are zero though they have a magnitude, or keep them zero.",
)
@click.option(
    "--verify",
    "check",
    type=click.Choice(list(_SAMPLES)),
    default="sample",
    show_default=True,
    help="Recompute so much of the result before it appears.",
)
@click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    help="Check everything, the base's rows too, and write nothing.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress and no summary.")
@json_option
@read_options
def _merge(
    adapter: Path,
    output: Path,
    base: Path | None,
    dtype: DType | None,
    max_shard_size: int | None,
    quantize: str | None,
    keep_dense: tuple[str, ...],
    min_survival: float | None,
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
    """Merge an adapter into its base model.

    The output folder appears complete, or not at all. Its path is printed when it is done.
    """
    if keep_dense and quantize is None:
        raise click.UsageError("--keep-dense goes with --quantize")
    if min_survival is not None and (quantize is None or dry_run):
        raise click.UsageError("--min-survival goes with --quantize, and not with --dry-run")
    from dora_convert import api

    how = api.MergeOptions(
        dtype=dtype,
        max_shard_size=max_shard_size,
        workers=workers,
        keep_zero_rows=zero_rows == "keep",
        overwrite=overwrite,
        dry_run=dry_run,
        samples=_SAMPLES[check],
        quantize=quantize,
        keep_dense=keep_dense,
        min_survival=min_survival,
    )
    options = reading_options(**reading)
    with progress("merging", quiet=quiet or as_json) as listener:
        report = api.merge(adapter, output, base=base, options=options, how=how, listener=listener)
    if as_json:
        show_json("merge", report)
        return
    for text in report.notes:
        note(f"Note: {printable(text)}")
    if not quiet:
        _summary(report, dry_run=dry_run)
    if not dry_run:
        click.echo(os.fsencode(report.output))  # as it is, whatever the encoding


def _summary(report: MergeReport, *, dry_run: bool) -> None:
    verb = "would merge" if dry_run else "merged"
    note(
        f"{verb} {report.merged} tensors, replaced {report.replaced}, kept {report.untouched}: "
        f"{size(report.nbytes)} in {report.shards} shard{'s' * (report.shards != 1)}"
    )
    if dry_run:
        note(f"files: {printable(', '.join(report.files))}")
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
    if report.survival is not None:
        _survival(report.survival)


def _survival(survival: Survival) -> None:
    """What the grid made of the update, and what to do where that is not much."""
    total = survival.total
    note(
        f"survival: the {survival.scheme} grid keeps {total.kept:.1%} of the update and adds noise "
        f"of {total.noise:.2f} times its size ({total.plain_noise:.2f} without an adapter); "
        f"{total.codes_changed:.1%} of the codes changed"
    )
    lost = {path: f.kept for path, f in survival.modules.items() if f.kept < _SWALLOWED}
    if lost:
        worst = min(lost, key=lost.__getitem__)
        note(
            f"Warning: the grid swallowed the update of {len(lost)} of {len(survival.modules)} "
            f"modules ({printable(worst)} keeps {lost[worst]:.1%}), most likely because the base "
            "lies on it already. Merge into the 16-bit original, store the result dense or in more "
            "bits, or serve the base with the adapter from to-lora beside it."
        )


COMMAND = _merge
