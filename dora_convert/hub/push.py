"""A finished folder to a repository: large files first, then one commit, or nothing at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_convert.errors import HubError, VerificationError
from dora_convert.hub.client import endpoint, open_api, sentences, tree
from dora_convert.hub.refs import Ref

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = ["Changes", "Content", "Destination", "Pushed", "Target", "compared", "look_at", "send"]

Content = Path | bytes

# What a former output may have left, and a loader would take with, or instead of, the new one.
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model|adapters|pytorch_lora_weights)[\w.-]*"
    r"\.(safetensors|bin)(\.index\.json)?"
)
_LARGE = 10_000_000
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
    """What was sent, or would be. `commit` is empty if there was nothing to commit."""

    repo: str
    url: str
    commit: str
    sent: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    nbytes: int
    dry_run: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A repository as it was found; `parent` is its commit, None if it is not there yet."""

    api: HfApi
    ref: Ref
    parent: str | None
    has_branch: bool
    entries: Mapping[str, RepoFile] = field(default_factory=dict)

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

    sent: tuple[str, ...]
    replaced: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]


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


def compared(target: Target, files: Mapping[str, Content]) -> Changes:
    """What has to change for the repository to hold these files, and no weights but theirs."""
    known = target.entries
    same = {n for n, content in files.items() if n in known and _is_same(content, known[n])}
    sent = [name for name in sorted(files) if name not in same]
    return Changes(
        sent=tuple(sent),
        replaced=tuple(name for name in sent if name in known and name not in _TEXTS),
        removed=tuple(n for n in sorted(known) if n not in files and _WEIGHTS.fullmatch(n)),
        unchanged=tuple(sorted(same)),
    )


def send(
    target: Target,
    changes: Changes,
    files: Mapping[str, Content],
    to: Destination,
    *,
    dry_run: bool = False,
) -> Pushed:
    """Make the changes, and check that the Hub holds what was sent.

    Readers see the old files or all of the new ones. Raises HubError, also if the repository was
    changed since it was looked at, and VerificationError.
    """
    commit, page = "", ""
    if (changes.sent or changes.removed) and not dry_run:
        with sentences(target.api, target.ref):
            commit, page = _sent(target, changes, files, to)
    return Pushed(
        repo=target.ref.repo,
        url=page or _page(target),
        commit=commit,
        sent=changes.sent,
        removed=changes.removed,
        unchanged=changes.unchanged,
        nbytes=sum(_size(files[name]) for name in changes.sent),
        dry_run=dry_run,
    )


def _page(target: Target) -> str:
    page, revision = f"{endpoint(target.api)}/{target.ref.repo}", target.ref.revision
    return page if revision in (None, "main") else f"{page}/tree/{revision}"


def _sent(
    target: Target, changes: Changes, files: Mapping[str, Content], to: Destination
) -> tuple[str, str]:
    """The commit, and the address of the pull request if there is one."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard  # noqa: PLC0415

    api, repo = target.api, target.ref.repo
    parent = target.parent
    card = files.get("README.md")
    if isinstance(card, bytes):
        # The commit asks too, but after the weights were sent.
        ModelCard(card.decode()).validate()
    if parent is None:
        api.create_repo(repo, private=to.private)
        parent = str(api.model_info(repo).sha)
    if not target.has_branch:
        api.create_branch(repo, branch=str(to.revision), revision=parent)
    place: dict[str, Any] = {"revision": to.revision, "create_pr": to.create_pr}
    added = []
    for name in changes.sent:
        content = files[name]
        operation = CommitOperationAdd(name, content)
        if _size(content) > _LARGE or _WEIGHTS.fullmatch(name):
            api.preupload_lfs_files(repo, [operation], **place)
        added.append(operation)
    removed = [CommitOperationDelete(name, is_folder=False) for name in changes.removed]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*added, *removed]
    try:
        info: CommitInfo = api.create_commit(
            repo, operations, commit_message=to.message, parent_commit=parent, **place
        )
    except Exception:
        # The answer may be what was lost, and not the commit. A pull request has no place yet.
        now = None if to.create_pr else api.model_info(repo, revision=to.revision).sha
        if now in (None, parent) or _differences(tree(api, repo, str(now)), added, files):
            raise
        return str(now), ""
    wrong = _differences(tree(api, repo, info.oid), added, files)
    if wrong:
        raise VerificationError(
            "the Hub holds other files than were sent", problems=wrong, hint="Push once more."
        )
    return info.oid, str(info.pr_url or "")


def _differences(
    entries: Mapping[str, RepoFile],
    added: list[CommitOperationAdd],
    files: Mapping[str, Content],
) -> list[str]:
    """Where the Hub says that it holds something else than what was sent."""
    wrong = []
    for operation in added:
        name = operation.path_in_repo
        entry = entries.get(name)
        if entry is None:
            wrong.append(f"{name}: missing")
        elif entry.lfs is not None and entry.lfs.sha256 != operation.upload_info.sha256.hex():
            wrong.append(f"{name}: sha256 {entry.lfs.sha256}")
        elif entry.lfs is None and not _is_same(files[name], entry):
            wrong.append(f"{name}: differs")
    return wrong


def _is_same(content: Content, entry: RepoFile) -> bool:
    size = _size(content)
    if entry.size != size:
        return False
    if entry.lfs is not None:
        return _digest(content, hashlib.sha256()) == entry.lfs.sha256
    # As git names contents; no use as a protection, and none is made of it.
    return _digest(content, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)) == (
        entry.blob_id
    )


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _digest(content: Content, digest: Any) -> str:
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return str(digest.hexdigest())
