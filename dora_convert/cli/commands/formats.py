"""`dora-convert formats`."""

from __future__ import annotations

import dataclasses

import click

from dora_convert.cli.console import show_json
from dora_convert.cli.params import json_option

__all__ = ["COMMAND"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Formats:
    adapters: dict[str, str]
    quantizations: tuple[str, ...]
    stacks: dict[str, str]


@click.command("formats")
@click.option(
    "--example-spec",
    is_flag=True,
    help="Print a commented description of a format instead, as --spec takes them.",
)
@json_option
def _formats(*, example_spec: bool, as_json: bool) -> None:
    """List adapter formats, quantisations, and the stacks that to-lora knows."""
    from dora_convert.formats import example_spec as example
    from dora_convert.formats import formats as registry
    from dora_convert.planning.stacks import STACKS
    from dora_convert.quant import quantizers

    if example_spec:
        click.echo(example(), nl=False)
        return
    titles = {name: registry.get(name).title for name in registry.names()}
    stacks = {name: stack.title for name, stack in STACKS.items()}
    if as_json:
        show_json("formats", _Formats(titles, quantizers.names(), stacks))
        return
    for head, names in (("Adapter formats", titles), ("Stacks (to-lora --for)", stacks)):
        click.echo(f"{head}:")
        for name, title in names.items():
            click.echo(f"  {name:12} {title}")
        click.echo()
    click.echo("Quantised bases, and most with merge --quantize:")
    click.echo(f"  {', '.join(quantizers.names())}")


COMMAND = _formats
