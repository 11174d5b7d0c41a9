"""Commands by file: `commands/to_lora.py` is the command `to-lora`, imported when it is named."""

from __future__ import annotations

import click

from dora_convert.registry import Registry

__all__ = ["CommandGroup"]

commands: Registry[click.Command] = Registry("dora_convert.cli.commands", "COMMAND", is_open=False)


class CommandGroup(click.Group):
    """A group whose commands are the plug-ins of `cli/commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return [name.replace("_", "-") for name in commands.names()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for click to say that there is none."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return commands.get(cmd_name.replace("-", "_"))
