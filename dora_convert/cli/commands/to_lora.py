"""`dora-convert to-lora ADAPTER -o OUT`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dora_convert.cli.console import note, printable, progress, show_json, show_path, size
from dora_convert.cli.params import (
    DTYPE,
    PATH,
    as_dtype,
    base_option,
    device_options,
    examples,
    json_option,
    nbytes,
    read_options,
    reading_options,
    workers_option,
)
from dora_convert.cli.publishing import Sending, push_options, show_pushed
from dora_convert.core.lora import DEFAULT_RANK, RankChoice
from dora_convert.core.tensors import DType
from dora_convert.planning.stacks import STACKS, WITHOUT_LORA

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dora_convert.core.lora import FitReport, LoraReport

    _Text = click.ParamType[str]
else:
    _Text = click.ParamType  # which older versions of click have no parameter for

__all__ = ["COMMAND"]

_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)


class _Form(_Text):
    """The file formats, looked up where they are asked for: the list of commands does without."""

    name = "form"

    @cached_property
    def _choice(self) -> click.Choice[str]:
        from dora_convert.loras import loras

        return click.Choice(loras.names())

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self._choice.get_metavar(param, ctx)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return self._choice.convert(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return self._choice.shell_complete(ctx, param, incomplete)


@click.command(
    "to-lora",
    epilog=examples(
        "dora-convert to-lora ./adapter --base ./model --rank 32 --output ./lora",
        "dora-convert to-lora ./adapter -b ./model --energy 0.95 --for vllm -o ./lora",
    ),
)
@click.argument("adapter", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write; a new one.")
@base_option
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"One rank for all modules [{DEFAULT_RANK}].",
)
@click.option(
    "--energy", type=_SHARE, metavar="F", help="The least rank that keeps this share of |T|^2."
)
@click.option(
    "--max-residual", type=_SHARE, metavar="F", help="The least rank that misses at most this."
)
@click.option(
    "--budget", type=nbytes, metavar="SIZE", help="The largest ranks that fit in this many bytes."
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    metavar="N",
    default=512,
    show_default=True,
    help="The largest rank that --energy, --max-residual and --budget may choose.",
)
@click.option(
    "--for",
    "stack",
    type=click.Choice([*STACKS, *WITHOUT_LORA]),
    default="any",
    show_default=True,
    help="Who is to load it.",
)
@click.option(
    "--to",
    "form",
    type=_Form(),
    help="File format [the first that the stack loads].",
)
@click.option(
    "--weight",
    type=click.Choice(["plain", "norm"]),
    help="Weight errors by the gain of the norm before a module, or not [norm; with --fit plain].",
)
@click.option(
    "--stats", type=PATH, metavar="FILE", help="Weight errors by what dora-convert stats wrote."
)
@click.option(
    "--fit",
    type=PATH,
    metavar="FILE",
    help="Then fit the factors to what the whole model, in memory, puts out on these texts; "
    "one a line.",
)
@click.option("--compact", is_flag=True, help="A rank for each module, where the stack reads it.")
@click.option("--exact", is_flag=True, help="Full decompositions instead of the iteration.")
@click.option(
    "--fail-above", type=_SHARE, metavar="F", help="Exit 7 if the LoRA misses more than this."
)
@click.option(
    "--dtype",
    type=DTYPE,
    callback=as_dtype,
    metavar="TYPE",
    default="float32",
    show_default=True,
    help="Write the factors as bfloat16, float16 or float32 (bf16, fp16, fp32).",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    metavar="N",
    default=0,
    show_default=True,
    help="Of the random start.",
)
@workers_option
@device_options
@click.option("--per-module", is_flag=True, help="List every module.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@push_options
@click.option("-q", "--quiet", is_flag=True, help="Show no progress and no summary.")
@json_option
@read_options
def _to_lora(
    adapter: Path,
    output: Path,
    base: Path | None,
    rank: int | None,
    energy: float | None,
    max_residual: float | None,
    budget: int | None,
    max_rank: int,
    stack: str,
    form: str | None,
    weight: str | None,
    stats: Path | None,
    fit: Path | None,
    fail_above: float | None,
    dtype: DType,
    seed: int,
    workers: int | None,
    device: str,
    max_memory: int | None,
    *,
    compact: bool,
    exact: bool,
    per_module: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    sending: Sending,
    **reading: Any,
) -> None:
    """Approximate a DoRA by the best plain LoRA, for stacks that refuse DoRA.

    The effective update T = W' - W of each module has full rank in general: what the LoRA misses
    of it is computed exactly and reported. OUTPUT is a folder, by default a PEFT adapter with
    lora_alpha = r. It appears complete, or not at all; what was interrupted begins anew.
    """
    given = [v for v in (rank, energy, max_residual, budget) if v is not None]
    if len(given) > 1:
        raise click.UsageError("--rank, --energy, --max-residual and --budget exclude each other")
    if stats is not None and weight is not None:
        raise click.UsageError("--weight and --stats exclude each other")
    from dora_convert import api

    choice = RankChoice(
        rank=rank,
        energy=energy,
        max_residual=max_residual,
        budget=budget,
        ceiling=max_rank,
    )
    how = api.LoraOptions(
        choice=choice if given else None,
        stack=stack,
        form=form,
        compact=compact,
        dtype=dtype,
        exact=exact,
        seed=seed,
        limit=fail_above,
        weight=weight,
        stats=stats,
        fit=fit,
        workers=workers,
        device=device,
        max_memory=max_memory,
        overwrite=overwrite,
    )
    options = reading_options(**reading)
    with progress("approximating", quiet=quiet or as_json) as listener:
        report = api.to_lora(
            adapter, output, base=base, options=options, how=how, listener=listener
        )
    pushed = sending(report.output)
    if as_json:
        show_json("to-lora", report, pushed=pushed)
        return
    for text in report.notes:
        note(f"Note: {printable(text)}")
    if per_module:
        for module in report.modules:
            note(
                f"{printable(module.path)}: rank {module.rank}, misses {module.residual:.2%} "
                f"(without the magnitude {module.without_magnitude:.2%})"
            )
    if report.output is None:
        note(report.advice)
        return
    if not quiet:
        _summary(report)
    show_path(report.output)
    show_pushed(pushed)


def _summary(report: LoraReport) -> None:
    note(
        f"{len(report.modules)} modules at rank {report.rank}, {size(report.nbytes)}, "
        f"in {report.seconds['total']:.1f} s"
    )
    note(
        f"misses {report.residual:.2%} of the update; the trained factors without the magnitude "
        f"would miss {report.without_magnitude:.2%}"
    )
    if report.weighted_residual is not None:
        note(f"misses {report.weighted_residual:.2%} of its effect on the weighted outputs")
    if report.fit is not None:
        note(_fitted(report.fit))
    note(report.advice)


def _fitted(fit: FitReport) -> str:
    if not fit.best_step:
        return (
            f"fitting made nothing better on {fit.held_out} held-out texts, where hidden states "
            f"are {fit.before:.2%} off: the factors are as they were"
        )
    return (
        f"fitted on {fit.texts} texts: on {fit.held_out} others hidden states are {fit.after:.2%} "
        f"off the DoRA's, {fit.before:.2%} before"
    )


COMMAND = _to_lora
