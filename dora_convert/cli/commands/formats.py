"""`dora-convert formats`."""

from __future__ import annotations

import dataclasses

import click

from dora_convert.cli.console import note, show_json
from dora_convert.cli.params import json_option

__all__ = ["COMMAND"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Formats:
    adapters: dict[str, str]
    quantizations: tuple[str, ...]


@click.command("formats")
@click.option(
    "--example-spec",
    is_flag=True,
    help="Print a commented description of a format instead, as --spec takes them.",
)
@json_option
def _formats(*, example_spec: bool, as_json: bool) -> None:
    """List the adapter formats that can be read, and the quantisations of bases."""
    from dora_convert.formats import example_spec as example
    from dora_convert.formats import formats as registry
    from dora_convert.quant import quantizers

    if example_spec:
        click.echo(example(), nl=False)
        return
    titles = {name: registry.get(name).title for name in registry.names()}
    if as_json:
        show_json("formats", _Formats(titles, quantizers.names()))
        return
    for name, title in titles.items():
        click.echo(f"{name:12} {title}")
    note(f"Quantised bases, and most with merge --quantize: {', '.join(quantizers.names())}")


COMMAND = _formats
