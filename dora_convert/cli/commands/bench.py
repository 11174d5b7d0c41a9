"""`dora-convert bench ADAPTER -b BASE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dora_convert.cli.console import note, show_json, size
from dora_convert.cli.params import (
    PATH,
    base_option,
    device_options,
    examples,
    json_option,
    nbytes,
    read_options,
    reading_options,
    workers_option,
)
from dora_convert.cli.tables import columns

__all__ = ["COMMAND"]


@click.command(
    "bench",
    epilog=examples(
        "dora-convert bench ./adapter --base ./model",
        "dora-convert bench ./adapter --base ./model --device cuda --timeline merge.json",
    ),
)
@click.argument("adapter", type=PATH)
@base_option
@click.option(
    "--sample",
    type=nbytes,
    metavar="SIZE",
    default="1GB",
    show_default=True,
    help="Merge so much of the result; more than the memory shows what the disk does.",
)
@click.option(
    "--folder",
    type=PATH,
    default=".",
    show_default=True,
    help="Make the files in this folder, on the disk to measure. They are deleted again.",
)
@click.option(
    "--timeline",
    type=PATH,
    metavar="FILE",
    help="Write what every thread and device did and when, for ui.perfetto.dev.",
)
@workers_option
@device_options
@json_option
@read_options
def _bench(
    adapter: Path,
    base: Path | None,
    sample: int,
    folder: Path,
    timeline: Path | None,
    workers: int | None,
    device: str,
    max_memory: int | None,
    *,
    as_json: bool,
    **reading: Any,
) -> None:
    """Measure what limits a merge on this machine.

    A part of it is read, merged and written, each stage with those before it, and copied as it is.
    """
    from dora_convert import api

    how = api.BenchOptions(
        sample=sample,
        folder=folder,
        workers=workers,
        device=device,
        max_memory=max_memory,
        timeline=timeline,
    )
    report = api.bench(adapter, base=base, options=reading_options(**reading), how=how)
    if as_json:
        show_json("bench", report)
        return
    rows = [
        (stage.name, size(stage.nbytes), f"{stage.seconds:.2f} s", f"{size(_rate(stage))}/s")
        for stage in report.stages
    ]
    for line in columns(("stage", "bytes", "took", "rate"), rows):
        click.echo(line)
    if report.activities:
        click.echo()
        shares = [(a.stage, f"{a.seconds:.2f} s", f"{a.busy:.0%}") for a in report.activities]
        for line in columns(("while merging", "took", "of the time"), shares):
            click.echo(line)
    note(
        f"merging took {report.of_copy:.2f} times as long as copying, with {report.workers} "
        f"workers on {', '.join(report.devices)}; the limit is "
        f"{'the disk' if report.limit == 'disk' else 'the arithmetic'}; all of the "
        f"{size(report.nbytes)} would take about {report.seconds:.0f} s"
    )


def _rate(stage: Any) -> float:
    return float(stage.nbytes / max(stage.seconds, 1e-9))


COMMAND = _bench
