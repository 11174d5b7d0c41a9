"""A push that begins with the first finished shard, and is a commit once all is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.cards import CARD
from dora_convert.api.pushing import (
    Consent,
    PushOptions,
    add_card,
    card_of,
    check_names,
    files_of,
    require_consent,
    text_of,
)
from dora_convert.errors import HubError
from dora_convert.hub import upload as hub
from dora_convert.hub.ahead import Ahead
from dora_convert.hub.client import sentences, without_bars
from dora_convert.hub.push import (
    Changes,
    Pushed,
    begin,
    check_card,
    committed,
    compared,
    is_text,
    look_at,
    page_of,
    require_writable,
)
from dora_convert.storage.journal import Sealed
from dora_convert.storage.oserrors import writing

if TYPE_CHECKING:
    from dora_convert.core.protocols import Listener

__all__ = ["Offering", "Upload", "send_ahead"]


class Upload:
    """One for one merge: `take` every shard, `finish` with the rest; `pushed` says what came of it.

    That the repository can be written is found out here. What is in it is not compared with what is
    to come, since that is not there yet: any file but a card and a licence needs consent. Raises
    InputError, OutputError without consent, and HubError.
    """

    def __init__(
        self, repo: str, *, how: PushOptions | None = None, consent: Consent | None = None
    ) -> None:
        self.pushed: Pushed | None = None
        self._how = how or PushOptions()
        check_names(repo, self._how)
        self._target = look_at(repo, self._how)
        require_writable(self._target, self._how)
        held = tuple(name for name in sorted(self._target.entries) if not is_text(name))
        if held and not self._how.create_pr:
            require_consent(consent, repo, Changes(replaced=held))
        self._upload: hub.Upload | None = None
        self._sizes: dict[str, int] = {}
        self._resumed: dict[str, int] = {}

    @property
    def place(self) -> str:
        """Repository, and branch or kind of change, that it goes to."""
        where = "a pull request" if self._how.create_pr else self._how.revision
        return self._target.ref.repo + (f" ({where})" if where else "")

    def take(self, name: str, shard: Path, origin: str | None = None) -> bool:
        """Send a shard, to be called `name`, or have the Hub copy it from `origin`, its base.

        Then delete it here. Whether it was sent, and not left for the commit.
        """
        with sentences(self._target.api, self._target.ref):
            self._upload = self._upload or begin(self._target, self._how, origin)
            self._sizes[name] = shard.stat().st_size
            with without_bars():
                sent = self._upload.add(name, shard, at_once=True)
        if sent:
            with writing(shard):
                shard.unlink()
        return sent

    def resume(self, shard: Sealed, origin: str | None = None) -> None:
        """An interrupted run has sent this one."""
        with sentences(self._target.api, self._target.ref):
            self._upload = self._upload or begin(self._target, self._how, origin)
            self._upload.add_known(shard.file, shard.sha256, shard.nbytes)
        self._resumed[shard.file] = shard.nbytes

    def finish(self, folder: Path) -> None:
        """Send what else is in the folder, with a card, and make the commit."""
        target, how, shards = self._target, self._how, self._sizes | self._resumed
        files = {name: at for name, at in files_of(folder).items() if name not in shards}
        own = text_of(folder / CARD) if CARD in files else None
        card, notes = card_of(target, folder, own, None)
        add_card(files, folder, card)
        changes = compared(target, files)
        removed = tuple(name for name in changes.removed if name not in shards)
        if self._upload is None:
            raise HubError("there is no shard to push")
        with self._telling(), sentences(target.api, target.ref):
            check_card(files[CARD])
            for name in changes.sent:
                self._upload.add(name, files[name])
            commit, page = committed(target, self._upload, how, removed)
        copied = tuple(sorted(self._upload.copied))
        sizes = shards | {name: hub.size_of(files[name]) for name in changes.sent}
        sizes = {name: size for name, size in sizes.items() if name not in copied}
        self.pushed = Pushed(
            repo=target.ref.repo,
            url=page or page_of(target),
            commit=commit,
            sent=tuple(sorted(sizes)),
            removed=removed,
            unchanged=changes.unchanged,
            nbytes=sum(sizes.values()),
            dry_run=False,
            notes=tuple(notes),
            copied=copied,
        )

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """A Hub that has lost what was sent is no reason to be stuck."""
        try:
            yield
        except Exception as error:
            if self._resumed:
                error.add_note("If it is the same each time, --restart sends all shards anew.")
            raise


def send_ahead(repo: str, *, how: PushOptions | None = None) -> Ahead:
    """What sends the shards of a merge as they are made, for `push` to commit them afterwards.

    Raises InputError for what is no repository.
    """
    how = how or PushOptions()
    check_names(repo, how)
    return Ahead(repo, how)


@dataclass(frozen=True, slots=True)
class Offering:
    """A listener that also has every shard sent `ahead`, if that is wanted.

    `origin` is the base, as `org/name@commit`, if it is one of the Hub.
    """

    listener: Listener
    ahead: Ahead | None
    origin: str | None
    folder: Path = Path()

    @contextmanager
    def within(self, folder: Path) -> Iterator[Offering]:
        """The same for shards in this folder; none of them is sent after a failure."""
        try:
            yield replace(self, folder=folder)
        except BaseException:
            if self.ahead is not None:
                self.ahead.abandon()
            raise

    def started(self, nbytes: int) -> None:
        """See `Listener`."""
        self.listener.started(nbytes)

    def advanced(self, nbytes: int) -> None:
        """See `Listener`."""
        self.listener.advanced(nbytes)

    def sealed(self, file: str) -> None:
        """See `Listener`."""
        self.listener.sealed(file)
        self.offer(file)

    def offer(self, file: str) -> None:
        """A shard is there, and the journal knows it."""
        if self.ahead is not None:
            self.ahead.offer(file, self.folder / file, self.origin)

    def settle(self) -> None:
        """Wait for the shard that is being sent: the folder is about to get its name."""
        if self.ahead is not None:
            self.ahead.settled()
