"""`dora-convert completion SHELL`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["COMMAND"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    r"""Print a completion script for SHELL.

    \b
      eval "$(dora-convert completion bash)"
    """
    found = get_completion_class(shell)
    assert found is not None, shell
    script = found(ctx.find_root().command, {}, "dora-convert", "_DORA_CONVERT_COMPLETE")
    click.echo(script.source())


COMMAND = completion
