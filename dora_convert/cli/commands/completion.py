"""`dora-convert completion SHELL`."""

from __future__ import annotations

import click

from dora_convert.cli.console import COMPLETE, PROGRAM
from dora_convert.cli.params import examples

__all__ = ["COMMAND"]


@click.command(
    "completion",
    epilog=examples(
        'eval "$(dora-convert completion bash)"',
        'eval "$(dora-convert completion zsh)"',
        "dora-convert completion fish | source",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def _completion(ctx: click.Context, shell: str) -> None:
    """Print a completion script for SHELL.

    The line below that is for your shell, put into its startup file, turns completion on.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, shell
    script = found(ctx.find_root().command, {}, PROGRAM, COMPLETE)
    click.echo(script.source())


COMMAND = _completion
