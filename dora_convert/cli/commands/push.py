"""`dora-convert push DIR REPO`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dora_convert.cli.console import note, printable, show_json, size
from dora_convert.cli.params import PATH, examples, json_option

if TYPE_CHECKING:
    from dora_convert.hub.push import Changes

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
    help="Base model on the Hub, for the card; by default the one that an adapter names.",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, a new one too.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing it.")
@click.option("--commit-message", metavar="TEXT", help="Title of the commit or pull request.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@click.option("--yes", is_flag=True, help="Replace what is there without asking.")
@click.option("--verbose", is_flag=True, help="Show every problem, and where a bug is.")
@json_option
def _push(
    folder: Path,
    repo: str,
    base: str | None,
    revision: str | None,
    commit_message: str | None,
    *,
    private: bool,
    create_pr: bool,
    dry_run: bool,
    yes: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Send a finished output to the Hugging Face Hub, with a model card.

    Others see the old files or all of the new ones. The address is printed when it is done.
    """
    if create_pr and revision is not None:
        raise click.UsageError("--create-pr opens a new pull request; it goes with no --revision")
    from dora_convert import api

    how = api.PushOptions(
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        **({"message": commit_message} if commit_message else {}),
    )
    asks = sys.stdin is not None and sys.stdin.isatty() and not as_json

    def consent(changes: Changes) -> bool:
        return yes or (asks and _asked(repo, changes))

    report = api.push(folder, repo, base=base, how=how, consent=consent)
    if as_json:
        show_json("push", report)
        return
    for text in report.notes:
        note(f"Note: {printable(text)}")
    verb = "would send" if dry_run else "sent"
    note(
        f"{verb} {len(report.sent)} files, {size(report.nbytes)}; removed {len(report.removed)}, "
        f"unchanged {len(report.unchanged)}"
    )
    if dry_run:
        note(f"files: {printable(', '.join((*report.sent, *report.removed)) or 'none')}")
        return
    click.echo(report.url)


def _asked(repo: str, changes: Changes) -> bool:
    for name in changes.replaced:
        note(f"  {printable(name)} would be replaced")
    for name in changes.removed:
        note(f"  {printable(name)} would be removed")
    return click.confirm(f"{printable(repo)} has these files. Go on?", err=True)


COMMAND = _push
