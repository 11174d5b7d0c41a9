"""Commands by file: `commands/to_lora.py` is the command `to-lora`, imported when it is named."""

from __future__ import annotations

import click

from dora_convert.registry import Registry

__all__ = ["CommandGroup"]

_COMMANDS: Registry[click.Command] = Registry("dora_convert.cli.commands", "COMMAND", is_open=False)


class CommandGroup(click.Group):
    """A group whose commands are the plug-ins of `cli/commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return [name.replace("_", "-") for name in _COMMANDS.names()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for click to say that there is none."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return _COMMANDS.get(cmd_name.replace("-", "_"))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; where there is none, say which one was probably meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            close = get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(error.message + hint, ctx) from error
