"""The command line: `dora-convert COMMAND`."""

from __future__ import annotations

import atexit
import gc

import click

from dora_convert import __version__
from dora_convert.cli.boundary import guarded
from dora_convert.cli.console import PROGRAM
from dora_convert.cli.lazy import CommandGroup
from dora_convert.cli.params import examples

__all__ = ["cli", "main"]


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "dora-convert inspect ./adapter",
        "dora-convert merge ./adapter --base ./model --output ./merged",
    ),
)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Take a DoRA adapter from any trainer and make it run anywhere."""


def main() -> None:
    """Entry point: runs the command, and turns what goes wrong into a message and an exit code."""
    # torch brings very many objects that live as long as the process. Looking through them for
    # garbage, over and over while it is imported and once more at exit, takes half a second.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    guarded(cli)
