"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.tensors import DType

if TYPE_CHECKING:
    from dora_convert.api import ReadOptions

__all__ = [
    "DTYPE",
    "PATH",
    "as_dtype",
    "base_option",
    "device_options",
    "dtype_option",
    "examples",
    "json_option",
    "nbytes",
    "not_negative",
    "number",
    "read_options",
    "reading_options",
    "stacked",
    "workers_option",
]

F = TypeVar("F", bound=Callable[..., Any])

_DTYPES = {
    "bfloat16": DType.BF16,
    "bf16": DType.BF16,
    "float16": DType.F16,
    "fp16": DType.F16,
    "float32": DType.F32,
    "fp32": DType.F32,
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def nbytes(value: str) -> int:
    """Bytes from `5GB`, `500MB`, `2GiB` or a plain number; units are decimal but for the `i`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{value!r} is no size; write 5GB, 500MB or a number of bytes")
    number, unit, binary = found[1], found[2].upper(), found[3]
    step = 1024 ** ("KMGT".index(unit) + 1) if binary and unit else _UNITS[unit]
    size = int(float(number) * step)
    if size < 1:
        raise click.BadParameter("a shard needs at least one byte")
    return size


def number(value: str | float) -> float:
    """A finite number: click's own type takes NaN and infinity too."""
    try:
        parsed = float(value)
    except ValueError:
        parsed = math.nan
    if not math.isfinite(parsed):
        raise click.BadParameter(f"{value!r} is no finite number")
    return parsed


def not_negative(value: str | float) -> float:
    """A finite number of at least 0."""
    parsed = number(value)
    if parsed < 0:
        raise click.BadParameter(f"{value!r} is less than 0")
    return parsed


def as_dtype(_: click.Context, __: click.Parameter, value: str | None) -> DType | None:
    """What an option of type DTYPE calls back."""
    return None if value is None else _DTYPES[value]


PATH = click.Path(path_type=Path)
DTYPE = click.Choice(list(_DTYPES), case_sensitive=False)

dtype_option = click.option(
    "--dtype",
    type=DTYPE,
    callback=as_dtype,
    metavar="TYPE",
    help="Write all weights as bfloat16, float16 or float32 (bf16, fp16, fp32); by default as in "
    "the base.",
)

base_option = click.option(
    "-b",
    "--base",
    type=PATH,
    metavar="MODEL",
    help="Base model: a folder, or org/name[@revision] on the Hub; by default the one that the "
    "adapter names.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object; errors too, on stderr."
)
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Threads; by default one a core."
)


def examples(*lines: str) -> str:
    """The end of a help page."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def stacked(command: F, options: Sequence[Callable[[F], F]]) -> F:
    """The command with these options, shown in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def device_options(command: F) -> F:
    """Where the arithmetic is done; the command takes `device` and `max_memory`."""
    options = [
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            metavar="DEVICE",
            help="Do the arithmetic on cpu, cuda, cuda:0,cuda:1 or mps, or on auto, the faster.",
        ),
        click.option(
            "--max-memory",
            type=nbytes,
            metavar="SIZE",
            help="Take so much of the device's memory at most; by default half of what is free.",
        ),
    ]
    return stacked(command, options)


def read_options(command: F) -> F:
    """How adapter and base are read; the command takes them as `**reading`."""
    options = [
        click.option(
            "--include",
            multiple=True,
            metavar="GLOB",
            help="Use only the modules whose path matches, as '*.q_proj'. Can be repeated.",
        ),
        click.option(
            "--exclude",
            multiple=True,
            metavar="GLOB",
            help="Leave out the modules whose path matches. Can be repeated.",
        ),
        click.option(
            "--ignore",
            multiple=True,
            metavar="GLOB",
            help="Leave out the adapter's tensors whose name matches. Can be repeated.",
        ),
        click.option(
            "--axis",
            type=click.Choice([axis.value for axis in MagnitudeAxis]),
            help="What magnitudes belong to, outputs or inputs, where the files do not tell.",
        ),
        click.option(
            "--transposed",
            multiple=True,
            metavar="GLOB",
            help="Modules whose weight is stored [in, out]. Can be repeated.",
        ),
        click.option(
            "--scale",
            type=number,
            metavar="NUMBER",
            help="Multiply the update, inside the norm as PEFT's set_scale does; what it is "
            "multiplied with at all where the trainer saved no scaling.",
        ),
        click.option(
            "--format",
            metavar="NAME",
            help="The adapter's format, where its files do not tell; formats lists them.",
        ),
        click.option(
            "--spec",
            type=PATH,
            metavar="FILE",
            help="Read the adapter as FILE describes; formats --example-spec shows how.",
        ),
        click.option(
            "--trained-on",
            metavar="SCHEME",
            help="Take the base as it was in training where it was loaded in nf4, nf4_dq (double "
            "quantisation), fp4 or int8, as QDoRA does; the adapter does not tell.",
        ),
        click.option(
            "--allow-pickle",
            is_flag=True,
            help="Read .bin and .pt files too; nothing in them is run.",
        ),
        click.option("--verbose", is_flag=True, help="Show every problem, and where a bug is."),
    ]
    return stacked(command, options)


def reading_options(axis: str | None, **others: Any) -> ReadOptions:
    """The options of `read_options` as the api takes them."""
    from dora_convert.api import ReadOptions

    others.pop("verbose")
    return ReadOptions(axis=MagnitudeAxis(axis) if axis else None, **others)
