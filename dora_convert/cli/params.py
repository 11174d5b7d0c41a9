"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.tensors import DType

__all__ = ["DTYPE", "SIZE", "base_option", "json_option", "read_options"]

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


class _Size(click.ParamType[int]):
    """Bytes: `5GB`, `500MB`, `2GiB`, or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes; decimal units as everywhere in the field, binary ones with an i."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is no size; write 5GB, 500MB or a number of bytes", param, ctx)
        number, unit, binary = found[1], found[2].upper(), found[3]
        step = 1024 ** ("KMGT".index(unit) + 1) if binary and unit else _UNITS[unit]
        size = int(float(number) * step)
        if size < 1:
            self.fail("a shard needs at least one byte", param, ctx)
        return size


class _DTypeName(click.Choice[str]):
    """Element type of plain floats."""

    def __init__(self) -> None:
        super().__init__(list(_DTYPES), case_sensitive=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The DType of a name."""
        return value if isinstance(value, DType) else _DTYPES[super().convert(value, param, ctx)]


SIZE = _Size()
DTYPE = _DTypeName()

base_option = click.option(
    "-b",
    "--base",
    type=click.Path(path_type=Path),
    help="The base model's folder (default: the one that the adapter names, if it is a folder).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


def read_options(command: F) -> F:
    """How adapter and base are read; the command takes them as `**reading`."""
    options = [
        click.option(
            "--include", multiple=True, metavar="GLOB", help="Only modules whose path matches."
        ),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these modules out."),
        click.option(
            "--ignore", multiple=True, metavar="GLOB", help="Leave out these adapter tensors."
        ),
        click.option(
            "--axis",
            type=click.Choice([axis.value for axis in MagnitudeAxis]),
            help="What a magnitude belongs to, where the file does not tell.",
        ),
        click.option(
            "--transposed",
            multiple=True,
            metavar="GLOB",
            help="Modules whose weight is stored [in, out].",
        ),
        click.option(
            "--scale",
            type=float,
            default=1.0,
            show_default=True,
            help="Multiplies the update inside the norm (PEFT's set_scale).",
        ),
        click.option(
            "--allow-pickle", is_flag=True, help="Read .bin files too (weights_only, no code runs)."
        ),
        click.option("--verbose", is_flag=True, help="Show every problem, and where a bug is."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
