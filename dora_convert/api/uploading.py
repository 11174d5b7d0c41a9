"""A push that begins with the first finished shard, and is a commit once all is there."""

from __future__ import annotations

from pathlib import Path

from dora_convert.api.cards import CARD
from dora_convert.api.pushing import (
    Consent,
    PushOptions,
    card_of,
    check_names,
    files_of,
    require_consent,
    text_of,
)
from dora_convert.errors import HubError
from dora_convert.hub import upload as hub
from dora_convert.hub.client import sentences
from dora_convert.hub.push import (
    Changes,
    Pushed,
    begin,
    check_card,
    compared,
    is_text,
    look_at,
    page_of,
    require_writable,
)
from dora_convert.storage.oserrors import writing

__all__ = ["Upload"]


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

    def take(self, shard: Path) -> None:
        """Send a shard, and delete it here."""
        with sentences(self._target.api, self._target.ref):
            self._upload = self._upload or begin(self._target, self._how)
            self._sizes[shard.name] = shard.stat().st_size
            sent = self._upload.add(shard.name, shard, at_once=True)
        if sent:
            with writing(shard):
                shard.unlink()

    def finish(self, folder: Path) -> None:
        """Send what else is in the folder, with a card, and make the commit."""
        target, how, shards = self._target, self._how, self._sizes
        files = {name: at for name, at in files_of(folder).items() if name not in shards}
        own = text_of(folder / CARD) if CARD in files else None
        card, notes = card_of(target, folder, own, None)
        files[CARD] = card.encode()
        changes = compared(target, files)
        removed = tuple(name for name in changes.removed if name not in shards)
        if self._upload is None:
            raise HubError("there is no shard to push")
        with sentences(target.api, target.ref):
            check_card(files[CARD])
            for name in changes.sent:
                self._upload.add(name, files[name])
            commit, page = self._upload.commit(how.message, removed)
        sizes = shards | {name: hub.size_of(files[name]) for name in changes.sent}
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
        )
