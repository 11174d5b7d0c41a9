"""A model of which the headers are fetched, and of its weights what is read."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.hub.ranges import RemoteFile
from dora_convert.hub.refs import Ref
from dora_convert.storage.oserrors import writing
from dora_convert.storage.sparse import fill, open_sparse, released

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = ["is_worth_it", "snapshot_in_part"]

_SMALL = 4 << 20  # what is smaller is fetched whole, with a checksum, and kept in the cache
_HEAD = 1 << 16
_LONGEST_HEAD = 100_000_000
_PREFIX = ".dora-convert-"
_SETTLED = 60  # seconds after which a folder without a lock is one that a kill left


def is_worth_it(entry: RepoFile) -> bool:
    """Whether to read a file in parts: safetensors, whose headers say what lies where."""
    return entry.path.endswith(".safetensors") and entry.size > _SMALL


def snapshot_in_part(
    api: HfApi, ref: Ref, whole: Path, names: Sequence[str], parts: Mapping[str, RepoFile]
) -> Path:
    """A folder like `whole`, a snapshot in the Hub's cache, with all `names` in it.

    Those in `parts` are not there, and read as if they were; the others are the cache's own. It
    lies in the cache and goes when what is `released` around this ends. Raises HubError.
    """
    cache = whole.parents[2]
    _sweep(cache)
    with released() as stack:
        folder = stack.enter_context(_own_folder(cache))
    root = folder / whole.relative_to(cache)
    sparse = []
    for name in names:
        place = root / name
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        entry = parts.get(name)
        if entry is not None:
            remote = RemoteFile(api, ref, whole.name, entry)
            digest = entry.lfs.sha256 if entry.lfs is not None else None
            open_sparse(place, entry.size, remote.read, sha256=digest)
            sparse.append(place)
        else:
            _link(whole / name, place)
    _fill_headers(sparse)
    return root


def _fill_headers(files: Sequence[Path]) -> None:
    """Two rounds, the second for headers longer than most."""
    sizes = {file: file.stat().st_size for file in files}
    fill((file, 0, max(min(_HEAD, size >> 10), 8)) for file, size in sizes.items())
    lengths = {}
    for file in files:
        with file.open("rb") as stream:
            lengths[file] = 8 + int.from_bytes(stream.read(8), "little")
    fill((file, 0, end) for file, end in lengths.items() if end <= _LONGEST_HEAD)


def _link(source: Path, target: Path) -> None:
    """The same content under another name, as a hard link where the file system has them."""
    real = os.path.realpath(source)
    with writing(target):
        target.unlink(missing_ok=True)
        try:
            os.link(real, target)
        except OSError:
            shutil.copyfile(real, target)


@contextmanager
def _own_folder(cache: Path) -> Iterator[Path]:
    """A new folder, locked as long as this process uses it, and then deleted."""
    with writing(cache):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache))
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Delete what killed runs left: the lock of a folder dies with its holder."""
    for folder in cache.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < _SETTLED:
                continue
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)
