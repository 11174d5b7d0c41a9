"""Options of commands whose result may go to the Hub, and how a push is shown."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dora_convert.cli.console import note, printable, size
from dora_convert.cli.params import stacked

if TYPE_CHECKING:
    from dora_convert.api import Consent, PushOptions, Upload
    from dora_convert.hub.ahead import Ahead
    from dora_convert.hub.push import Changes, Pushed

__all__ = ["Sending", "asking", "how_to_push", "place_options", "push_options", "show_pushed"]

F = TypeVar("F", bound=Callable[..., Any])


class Sending:
    """What becomes of a result: with a `repo` it is sent there, else nothing."""

    def __init__(
        self, repo: str | None, how: PushOptions | None = None, consent: Consent | None = None
    ) -> None:
        self._repo, self._how, self._consent = repo, how, consent
        self._stream: Upload | None = None
        self._ahead: Ahead | None = None

    def check(self) -> None:
        """Raise what the push would, as far as it is known before there is a result."""
        if self._repo is not None:
            from dora_convert import api

            api.check_push(self._repo, how=self._how, consent=self._consent)

    @property
    def has_all(self) -> bool:
        """Whether the result is on the Hub alone."""
        return self._stream is not None

    def by_shard(self, *, low_disk: bool) -> Upload | Ahead | None:
        """What takes the files of a result one by one, as they are made.

        With `low_disk` they are deleted here; else they are sent, and committed with the rest.
        """
        if self._repo is None:
            return None
        from dora_convert import api

        if low_disk:
            self._stream = api.Upload(self._repo, how=self._how, consent=self._consent)
            return self._stream
        self._ahead = api.send_ahead(self._repo, how=self._how)
        return self._ahead

    def __call__(self, output: str | None) -> Pushed | None:
        """Send a finished result, if there is one that was not sent as it was made."""
        if self._stream is not None:
            return self._stream.pushed
        if self._repo is None or output is None:
            return None
        from dora_convert import api

        try:
            return api.push(
                Path(output), self._repo, how=self._how, consent=self._consent, ahead=self._ahead
            )
        except BaseException as error:
            again = f"dora-convert push {output} {self._repo}"
            error.add_note(f"The result is in {output}; to send it from there: {again}")
            raise


_PLACE = (
    click.option("--private", is_flag=True, help="Make a new repository private."),
    click.option("--revision", metavar="BRANCH", help="Push to this branch, a new one too."),
    click.option(
        "--create-pr", is_flag=True, help="Open a pull request instead of changing the repository."
    ),
    click.option("--commit-message", metavar="TEXT", help="Title of the commit or pull request."),
    click.option("--yes", is_flag=True, help="Replace what is in the repository without asking."),
)
_KEYS = ("private", "revision", "create_pr", "commit_message", "yes")


def place_options(command: F) -> F:
    """Where a push goes."""
    return stacked(command, _PLACE)


def push_options(command: F) -> F:
    """`--push-to-hub` and where it goes; the command takes a `Sending` as `sending`.

    That the repository can be written is found out before the command begins.
    """

    @functools.wraps(command)
    def wrapped(push_to_hub: str | None, **given: Any) -> Any:
        place = {key: given.pop(key) for key in _KEYS}
        if push_to_hub is None:
            if any(place.values()):
                named = next(key for key in _KEYS if place[key])
                raise click.UsageError(f"--{named.replace('_', '-')} goes with --push-to-hub")
            return command(sending=Sending(None), **given)
        consent = asking(push_to_hub, yes=place.pop("yes"), as_json=given["as_json"])
        sending = Sending(push_to_hub, how_to_push(**place, dry_run=False), consent)
        sending.check()
        return command(sending=sending, **given)

    option = click.option(
        "--push-to-hub",
        metavar="REPO",
        help="Send the result to this repository of the Hub as well, as push does.",
    )
    return option(place_options(wrapped))  # type: ignore[return-value]


def how_to_push(
    *,
    private: bool,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    dry_run: bool,
) -> PushOptions:
    """The options as the api takes them."""
    if create_pr and revision is not None:
        raise click.UsageError("--create-pr opens a new pull request; it goes with no --revision")
    from dora_convert import api

    return api.PushOptions(
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        **({"message": commit_message} if commit_message else {}),
    )


def asking(repo: str, *, yes: bool, as_json: bool) -> Consent:
    """Consent that was given, or is asked for once where somebody can answer."""
    asks = sys.stdin is not None and sys.stdin.isatty() and not as_json
    given = yes

    def consent(changes: Changes) -> bool:
        nonlocal given
        given = given or (asks and _asked(repo, changes))
        return given

    return consent


def _asked(repo: str, changes: Changes) -> bool:
    for name in changes.replaced:
        note(f"  {printable(name)} would be replaced")
    for name in changes.removed:
        note(f"  {printable(name)} would be removed")
    return click.confirm(f"{printable(repo)} has these files. Go on?", err=True)


def show_pushed(pushed: Pushed | None) -> None:
    """Notes and sums on stderr, the address on stdout; of a dry run what would be sent."""
    if pushed is None:
        return
    for text in pushed.notes:
        note(f"Note: {printable(text)}")
    verb = "would send" if pushed.dry_run else "sent"
    copied = f"had {len(pushed.copied)} copied on the Hub, " if pushed.copied else ""
    note(
        f"{verb} {len(pushed.sent)} files, {size(pushed.nbytes)}; {copied}"
        f"removed {len(pushed.removed)}, unchanged {len(pushed.unchanged)}"
    )
    if pushed.dry_run:
        note(f"files: {printable(', '.join((*pushed.sent, *pushed.removed)) or 'none')}")
        return
    click.echo(pushed.url)
