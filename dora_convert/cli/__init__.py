"""The command line: `dora-convert COMMAND`."""

from __future__ import annotations

import click

from dora_convert import __version__
from dora_convert.cli.boundary import guarded
from dora_convert.cli.lazy import CommandGroup

__all__ = ["cli", "main"]


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    r"""Take a DoRA adapter from any trainer and make it run anywhere.

    \b
      dora-convert inspect ./adapter
      dora-convert merge ./adapter --base ./model --output ./merged
    """


def main() -> None:
    """Entry point: runs the command, and turns what goes wrong into a message and an exit code."""
    guarded(cli)
