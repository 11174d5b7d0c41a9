"""A finished folder to a repository: large files first, then one commit, or nothing at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.errors import HubError
from dora_convert.hub.client import endpoint, open_api, sentences, tree
from dora_convert.hub.copying import Originals
from dora_convert.hub.refs import Ref, parse_ref
from dora_convert.hub.upload import Content, Upload, is_same, size_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = [
    "Changes",
    "Destination",
    "Pushed",
    "Target",
    "begin",
    "check_card",
    "committed",
    "compared",
    "is_text",
    "is_weights",
    "look_at",
    "page_of",
    "require_writable",
    "send",
]

# What a former output may have left, and a loader would take with, or instead of, the new one.
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model|adapters|pytorch_lora_weights)[\w.-]*"
    r"\.(safetensors|bin)(\.index\.json)?"
)
_PULLS = 50  # of the newest
_LICENSE = ("license", "license_name", "license_link")
# They say something about a model and are no part of it.
_TEXTS = frozenset({"README.md", "LICENSE", ".gitattributes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a push goes: a new repository is `private`; `revision` is a branch, `refs/pr/N` too.

    `create_pr` opens a pull request instead of changing the repository.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = "Upload with dora-convert"


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was sent, or would be. `commit` is empty if there was nothing to commit.

    `copied` are files that the Hub took from the base by itself.
    """

    repo: str
    url: str
    commit: str
    sent: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    nbytes: int
    dry_run: bool
    notes: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A repository as it was found; `parent` is its commit, None if it is not there yet."""

    api: HfApi
    ref: Ref
    parent: str | None
    has_branch: bool
    entries: Mapping[str, RepoFile] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[str, ...]:
        """The files of weights that are there."""
        return tuple(n for n in sorted(self.entries) if is_weights(n))

    def readme(self) -> Path | None:
        """The card that is there, fetched."""
        if "README.md" not in self.entries:
            return None
        with sentences(self.api, self.ref):
            return Path(self.api.hf_hub_download(self.ref.repo, "README.md", revision=self.parent))

    def license_of(self, repo: str) -> Mapping[str, str] | None:
        """What a model's card says of its licence; None if there is no such model on the Hub."""
        from huggingface_hub import errors  # noqa: PLC0415

        ref = Ref(repo)
        try:
            with sentences(self.api, ref):
                try:
                    data = self.api.model_info(repo).card_data
                except errors.RepositoryNotFoundError:
                    return None
        except HubError:  # a card is not worth a failure
            return None
        known = {key: getattr(data, key, None) for key in _LICENSE}
        return {key: value for key, value in known.items() if isinstance(value, str)}


@dataclass(frozen=True, slots=True)
class Changes:
    """Files to send, those among them that take the place of others, and stale weights."""

    sent: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()


def look_at(repo: str, to: Destination) -> Target:
    """What is in the repository, or that there is none. Raises HubError."""
    from huggingface_hub import errors, get_token  # noqa: PLC0415

    api, ref = open_api(), Ref(repo, to.revision)
    if not get_token():
        hint = "Log in with hf auth login, or set HF_TOKEN."
        raise HubError("pushing needs a login, and there is none", hint=hint)
    with sentences(api, ref):
        try:
            info, has_branch = api.model_info(repo, revision=to.revision), True
        except errors.RevisionNotFoundError:
            info, has_branch = api.model_info(repo), False
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            if to.create_pr:
                raise
            return Target(api, ref, None, has_branch=to.revision in (None, "main"))
        if to.private and not info.private:
            hint = "Make it private in its settings, or choose another name."
            raise HubError(
                f"{repo} exists and is public", where=f"{endpoint(api)}/{repo}", hint=hint
            )
        entries = tree(api, repo, str(info.sha))
        return Target(api, ref, info.sha, has_branch, entries)


def require_writable(target: Target, to: Destination) -> None:
    """Raise HubError if the Hub says by now that it would refuse the push; changes nothing.

    Everybody may open a pull request.
    """
    api, ref = target.api, target.ref
    if to.create_pr:
        return
    with sentences(api, ref):
        if target.parent is not None:
            api.auth_check(ref.repo, write=True)
            return
        user = api.whoami()
    owner = ref.repo.split("/")[0]
    owners = {user.get("name"), *(org.get("name") for org in user.get("orgs", ()))}
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if owner not in owners or role == "read":
        hint = f"It is that of {user.get('name')}; check its rights, and the name."
        raise HubError(f"the token that is stored may not make {ref.repo}", hint=hint)


def compared(target: Target, files: Mapping[str, Content]) -> Changes:
    """What has to change for the repository to hold these files, and no weights but theirs."""
    known = target.entries
    same = {n for n, content in files.items() if n in known and is_same(content, known[n])}
    sent = [name for name in sorted(files) if name not in same]
    return Changes(
        sent=tuple(sent),
        replaced=tuple(name for name in sent if name in known and not is_text(name)),
        removed=tuple(n for n in target.weights if n not in files),
        unchanged=tuple(sorted(same)),
    )


def send(
    target: Target,
    changes: Changes,
    files: Mapping[str, Content],
    to: Destination,
    *,
    ahead: Upload | None = None,
    origin: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Make the changes, and check that the Hub holds what was sent.

    What is in `ahead` was sent before. `origin`, as `org/name@commit`, may hold some of the files
    already. Readers see the old files or all of the new ones. Raises HubError, also if the
    repository was changed since it was looked at, and VerificationError.
    """
    sent, copied, commit, page = changes.sent, set[str](), "", ""
    if (changes.sent or changes.removed) and not dry_run:
        with sentences(target.api, target.ref):
            known = _proposed(target, changes, files, to) if to.create_pr else None
            if known is not None:
                sent, (commit, page) = (), known
            else:
                check_card(files.get("README.md"))
                upload = begin(target, to, origin, ahead)
                for name in changes.sent:
                    upload.add(name, files[name], at_once=is_weights(name))
                commit, page = committed(target, upload, to, changes.removed)
                copied = {*upload.copied}.intersection(changes.sent)
    sent = tuple(name for name in sent if name not in copied)
    return Pushed(
        repo=target.ref.repo,
        url=page or page_of(target),
        commit=commit,
        sent=sent,
        removed=changes.removed,
        unchanged=tuple(sorted({*files}.difference(sent, copied))),
        nbytes=sum(size_of(files[name]) for name in sent),
        dry_run=dry_run,
        copied=tuple(sorted(copied)),
    )


def committed(
    target: Target, upload: Upload, to: Destination, removed: Sequence[str]
) -> tuple[str, str]:
    """Make the commit; its hash, and the address of the pull request if it is one.

    Of a pull request whose answer is lost it is not known whether it was opened. So one is looked
    for before, which an earlier run may have opened, and after a failure.
    """

    def proposed() -> tuple[str, str] | None:
        return _open_pull(target, to, lambda held: not upload.differences(held), removed)

    if not to.create_pr:
        return upload.commit(to.message, removed)
    try:
        return proposed() or upload.commit(to.message, removed)
    except Exception:
        found = proposed()
        if found is None:
            raise
        return found


def _proposed(
    target: Target, changes: Changes, files: Mapping[str, Content], to: Destination
) -> tuple[str, str] | None:
    """The pull request that holds these files, before any of them is sent."""

    def is_held(held: Mapping[str, RepoFile]) -> bool:
        return all(name in held and is_same(files[name], held[name]) for name in changes.sent)

    return _open_pull(target, to, is_held, changes.removed)


def _open_pull(
    target: Target,
    to: Destination,
    is_held: Callable[[Mapping[str, RepoFile]], bool],
    removed: Sequence[str],
) -> tuple[str, str] | None:
    """Commit and address of our own open pull request that proposes just this."""
    api, repo = target.api, target.ref.repo
    pulls = api.get_repo_discussions(
        repo,
        author=api.whoami()["name"],
        discussion_type="pull_request",
        discussion_status="open",
    )
    for pull in islice(pulls, _PULLS):
        if pull.title != to.message:
            continue
        revision = f"refs/pr/{pull.num}"
        held = tree(api, repo, revision)
        if is_held(held) and not held.keys() & {*removed}:
            return str(api.model_info(repo, revision=revision).sha), pull.url
    return None


def begin(
    target: Target, to: Destination, origin: str | None = None, ahead: Upload | None = None
) -> Upload:
    """Make repository and branch if need be; nothing else is changed before the commit.

    What is in `ahead` was sent to this repository before; the files of `origin` can be copied.
    """
    api, repo, parent = target.api, target.ref.repo, target.parent
    if ahead is not None and parent is not None:
        ahead.rebase(parent)
        return ahead
    if parent is None:
        api.create_repo(repo, private=to.private)
        parent = str(api.model_info(repo).sha)
    if not target.has_branch:
        api.create_branch(repo, branch=str(to.revision), revision=parent)
    source = None if origin is None else parse_ref(origin)
    originals = None if source is None else Originals(api, source, repo)
    return Upload(
        api, repo, parent, {"revision": to.revision, "create_pr": to.create_pr}, originals
    )


def check_card(card: Content | None) -> None:
    """Have the Hub look at a card's metadata: the commit does too, but after all was sent."""
    from huggingface_hub import ModelCard  # noqa: PLC0415

    if isinstance(card, bytes):
        ModelCard(card.decode()).validate()


def is_text(name: str) -> bool:
    """Whether a file is about a model, and no part of it."""
    return name in _TEXTS


def is_weights(name: str) -> bool:
    """Whether a loader would take a file of this name for weights, or an index of them."""
    return _WEIGHTS.fullmatch(name) is not None


def page_of(target: Target) -> str:
    """Where people look at what was pushed."""
    page, revision = f"{endpoint(target.api)}/{target.ref.repo}", target.ref.revision
    return page if revision in (None, "main") else f"{page}/tree/{revision}"
