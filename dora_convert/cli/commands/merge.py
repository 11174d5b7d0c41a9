"""`dora-convert merge ADAPTER -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dora_convert.cli.console import note, printable, progress, show_json, show_path, size
from dora_convert.cli.params import (
    PATH,
    base_option,
    device_options,
    dtype_option,
    examples,
    json_option,
    nbytes,
    number,
    read_options,
    reading_options,
    workers_option,
)
from dora_convert.cli.publishing import Sending, push_options, show_pushed

if TYPE_CHECKING:
    from dora_convert.core.reports import MergeReport, Residual, Survival
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
    "--scales",
    type=click.Choice(["fold", "fresh"]),
    help="With --quantize: keep the scales of a base in the same scheme, times the factor of each "
    "row, or make new ones [whichever leaves less noise].",
)
@click.option(
    "--min-survival",
    type=number,
    metavar="SHARE",
    help="With --quantize: fail if less than SHARE (0 to 1) of a module's update is kept.",
)
@click.option(
    "--residual-rank",
    type=click.IntRange(min=1),
    metavar="R",
    help="With --quantize: also write OUTPUT/residual, a LoRA of what the grid took.",
)
@click.option(
    "--weight",
    type=click.Choice(["plain", "norm"]),
    default="plain",
    show_default=True,
    help="With --residual-rank: weight errors by the gain of the norm before a module.",
)
@click.option(
    "--stats",
    type=PATH,
    metavar="FILE",
    help="With --residual-rank: weight errors by what dora-convert stats wrote.",
)
@workers_option
@device_options
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
@click.option(
    "--low-disk",
    is_flag=True,
    help="Fetch the base from the Hub a shard at a time and drop it again; with --push-to-hub drop "
    "each shard that was sent, too, and leave no OUTPUT.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")
@click.option(
    "--restart",
    is_flag=True,
    help="Begin anew where another merge to OUTPUT was interrupted and is unfinished.",
)
@push_options
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
    scales: str | None,
    min_survival: float | None,
    residual_rank: int | None,
    weight: str,
    stats: Path | None,
    workers: int | None,
    device: str,
    max_memory: int | None,
    zero_rows: str,
    check: str,
    *,
    dry_run: bool,
    low_disk: bool,
    overwrite: bool,
    restart: bool,
    quiet: bool,
    as_json: bool,
    sending: Sending,
    **reading: Any,
) -> None:
    """Merge an adapter into its base model.

    The output folder appears complete, or not at all. Its path is printed when it is done. A merge
    that was interrupted goes on where it stopped when the same command is given again.
    """
    if (keep_dense or scales) and quantize is None:
        raise click.UsageError("--keep-dense and --scales go with --quantize")
    if min_survival is not None and (quantize is None or dry_run):
        raise click.UsageError("--min-survival goes with --quantize, and not with --dry-run")
    if residual_rank is not None and quantize is None:
        raise click.UsageError("--residual-rank goes with --quantize")
    if residual_rank is None and (stats is not None or weight != "plain"):
        raise click.UsageError("--weight and --stats go with --residual-rank")
    if stats is not None and weight != "plain":
        raise click.UsageError("--weight norm and --stats exclude each other")
    from dora_convert import api

    how = api.MergeOptions(
        dtype=dtype,
        max_shard_size=max_shard_size,
        workers=workers,
        device=device,
        max_memory=max_memory,
        keep_zero_rows=zero_rows == "keep",
        overwrite=overwrite,
        restart=restart,
        dry_run=dry_run,
        low_disk=low_disk,
        samples=_SAMPLES[check],
        quantize=quantize,
        keep_dense=keep_dense,
        scales=scales,
        min_survival=min_survival,
        residual=None
        if residual_rank is None
        else api.ResidualOptions(rank=residual_rank, weight=weight, stats=stats),
    )
    options = reading_options(**reading)
    upload = None if dry_run else sending.by_shard(low_disk=low_disk)
    with progress("merging", quiet=quiet or as_json) as listener:
        report = api.merge(
            adapter,
            output,
            base=base,
            options=options,
            how=how,
            listener=listener,
            upload=upload,
        )
    pushed = sending(None if dry_run else report.output)
    if as_json:
        show_json("merge", report, pushed=pushed)
        return
    for text in report.notes:
        note(f"Note: {printable(text)}")
    if not quiet:
        _summary(report, dry_run=dry_run)
    if not dry_run and not sending.has_all:
        show_path(report.output)
    show_pushed(pushed)


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
    rate = f", {size(report.nbytes / took)}/s" if took and not report.kept else ""
    if report.kept:
        note(f"of these shards {report.kept} were there from the interrupted run")
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
    if report.residual is not None:
        _residual(report.residual)


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
            "bits, or serve it with a LoRA of what is missing (--residual-rank)."
        )


def _residual(residual: Residual) -> None:
    total = residual.total
    note(
        f"residual: with the LoRA of rank {residual.rank} in residual/ the weights are "
        f"{total.corrected_error:.2%} off, {total.error:.2%} without; it keeps "
        f"{total.corrected_kept:.1%} of the update, {total.kept:.1%} without"
    )


COMMAND = _merge
