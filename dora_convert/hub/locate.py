"""From a ref to a folder: what is needed of a repository, at one commit, in the Hub's cache."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from dora_convert.errors import HubError
from dora_convert.hub.client import is_offline, open_api, patiently, sentences, tree
from dora_convert.hub.partly import is_worth_it, snapshot_in_part
from dora_convert.hub.refs import Ref, parse_ref
from dora_convert.storage.digest import file_sha256

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

__all__ = ["Choice", "local_path"]


class Choice(Protocol):
    """Which of a folder's files are needed; of one that is given by its name, which beside it."""

    def __call__(self, names: Sequence[str], *, file: str | None = None) -> list[str]:
        """Their names, from the folder on."""
        ...


_LOG = logging.getLogger(__name__)


def local_path(path: Path, choose: Choice, *, in_part: bool = False) -> Path:
    """`path` itself if it exists, else the folder or file that it names on the Hub.

    `choose` picks the needed ones of a folder's files. `in_part`: large ones that are not in the
    cache are not fetched but read from afar, as far as they are read, and only by the functions of
    `storage`. Raises HubError. A path that cannot be a ref is returned as well: whoever reads it
    says what is wrong.
    """
    name = str(path)
    if "\0" in name or os.path.lexists(path):
        return path
    ref = parse_ref(name)
    return path if ref is None else _fetched(ref, choose, in_part=in_part)


def _fetched(ref: Ref, choose: Choice, *, in_part: bool) -> Path:
    api = open_api()
    with sentences(api, ref):
        revision = api.resolve_revision(ref.repo, revision=ref.revision)
        _LOG.info("reading %s of the Hub, at commit %s", ref, revision.resolved)
        if is_offline():
            return _cached(ref, revision.resolved)
        entries = tree(api, ref.repo, revision.resolved)
        names = _chosen(ref, sorted(entries), choose)
        fresh = [name for name in names if not _is_cached(ref, name, revision.resolved)]
        parts = {n: entries[n] for n in fresh if in_part and is_worth_it(entries[n])}
        fresh = [name for name in fresh if name not in parts]
        patterns = [glob.escape(name) for name in names if name not in parts]
        folder = patiently(
            lambda: api.snapshot_download(ref.repo, revision=revision, allow_patterns=patterns)
        )
    for name in fresh:
        _check(Path(folder, name), entries[name], ref)
    root = snapshot_in_part(api, ref, Path(folder), names, parts) if parts else Path(folder)
    return root / ref.folder


def _chosen(ref: Ref, names: Sequence[str], choose: Choice) -> list[str]:
    if ref.folder in names:
        file = PurePosixPath(ref.folder)
        beside = [n.name for n in map(PurePosixPath, names) if n.parent == file.parent]
        return [str(file.parent / name) for name in choose(beside, file=file.name)]
    prefix = f"{ref.folder}/" if ref.folder else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    chosen = [prefix + name for name in choose(inside)]
    if not chosen:
        what = f"there is no model in {ref}"
        held = ", ".join(sorted({name.split("/")[0] for name in inside})[:12]) or "nothing"
        raise HubError(what, problems=[f"it holds {held}"] if inside else ())
    return chosen


def _is_cached(ref: Ref, name: str, commit: str) -> bool:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    return isinstance(try_to_load_from_cache(ref.repo, name, revision=commit), str)


def _cached(ref: Ref, commit: str) -> Path:
    from huggingface_hub import constants  # noqa: PLC0415

    name = "models--" + ref.repo.replace("/", "--")
    place = Path(constants.HF_HUB_CACHE, name, "snapshots", commit, ref.folder)
    if not place.exists():
        hint = "Unset HF_HUB_OFFLINE, or download it first where there is a network."
        what = f"{ref} is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub"
        raise HubError(what, hint=hint)
    return place


def _check(file: Path, entry: RepoFile, ref: Ref) -> None:
    """Compare what has just come with the Hub's sha256; the client looks at the size alone."""
    if entry.lfs is None:
        return
    if file_sha256(file) != entry.lfs.sha256:
        # Link and content, or the next run would take it for good.
        for place in (file.resolve(), file):
            place.unlink(missing_ok=True)
        what = f"{entry.path} of {ref.repo} was changed on its way here: its sha256 is another"
        raise HubError(what, hint="Run the command again.")
