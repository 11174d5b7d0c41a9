"""Which files of an input folder may be read: those that lie in it, and the Hub cache's links."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dora_convert.errors import InputError

__all__ = [
    "contents",
    "is_hub_name",
    "is_plain_name",
    "leaves",
    "list_files",
    "require_inside",
    "require_path",
]

_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def require_path(path: Path, kind: str) -> None:
    """Raise InputError unless `path` exists; one that reads like a Hub name gets that hint."""
    name = str(path)
    if "\0" not in name and os.path.exists(path):  # noqa: PTH110 - false, not an error, in all cases
        return
    known = is_hub_name(name)
    hint = f"Download it first: hf download {name} --local-dir {path.name}" if known else ""
    raise InputError(f"there is no {kind} at {name}", where=name, hint=hint)


def is_hub_name(name: str) -> bool:
    """Whether a text reads like a repository of the Hub, `org/name`."""
    return _REPO_ID.fullmatch(name) is not None


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file directly inside a folder."""
    return name.isprintable() and not set(name) & set("/\\") and name not in ("", ".", "..")


def list_files(root: Path) -> list[str]:
    """Name all that lies directly in `root` and is not a folder, sorted."""
    return sorted(entry.name for entry in root.iterdir() if not entry.is_dir())


def contents(root: Path) -> list[str]:
    """Name all that lies directly in `root`, for a message."""
    return sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())


def require_inside(root: Path, file: Path) -> None:
    """Raise InputError for a file that `leaves` its folder."""
    if leaves(root, file):
        what = f"{file.name} is a link to a file outside of its folder"
        hint = "Copy the file into the folder, or give the folder that it lies in."
        raise InputError(what, where=str(file), hint=hint)


def leaves(root: Path, file: Path) -> bool:
    """Whether symbolic links take `file`, found below `root`, out of what belongs to `root`.

    In the Hub's cache `snapshots/REVISION/x` is a link to `blobs/HASH` two folders up, which may be
    one to the `blobs` that all repositories of the cache share.
    """
    home = Path(os.path.realpath(root))
    target = Path(os.path.realpath(file))
    return not any(target.is_relative_to(place) for place in (home, *_blobs(home)))


def _blobs(home: Path) -> list[Path]:
    for revision in (home, *home.parents):
        if revision.parent.name == "snapshots":
            repo = revision.parent.parent
            shared = [repo.parent / "blobs"] if repo.name.startswith("models--") else []
            return [repo / "blobs", *shared]
    return []
