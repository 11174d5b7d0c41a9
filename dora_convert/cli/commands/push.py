"""`dora-convert push DIR REPO`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dora_convert.cli.console import show_json
from dora_convert.cli.params import PATH, examples, json_option
from dora_convert.cli.publishing import asking, how_to_push, place_options, show_pushed

__all__ = ["COMMAND"]


@click.command(
    "push",
    epilog=examples(
        "dora-convert push ./merged me/my-model --private",
        "dora-convert push ./lora them/their-model --create-pr",
    ),
)
@click.argument("folder", type=PATH, metavar="DIR")
@click.argument("repo")
@click.option(
    "-b",
    "--base",
    metavar="REPO",
    help="Base model on the Hub, for the card; by default the one that the output names.",
)
@place_options
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@click.option("--verbose", is_flag=True, help="Show every problem, and where a bug is.")
@json_option
def _push(
    folder: Path,
    repo: str,
    base: str | None,
    *,
    yes: bool,
    verbose: bool,
    as_json: bool,
    **place: Any,
) -> None:
    """Send a finished output to the Hugging Face Hub, with a model card.

    Others see the old files or all of the new ones. The address is printed when it is done.
    """
    how = how_to_push(**place)
    from dora_convert import api

    consent = asking(repo, yes=yes, as_json=as_json)
    report = api.push(folder, repo, base=base, how=how, consent=consent)
    if as_json:
        show_json("push", report)
        return
    show_pushed(report)


COMMAND = _push
