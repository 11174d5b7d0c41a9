"""One file that appears under its name complete, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_convert.errors import OutputError
from dora_convert.storage.oserrors import writing
from dora_convert.storage.publishing import sync

__all__ = ["check_file", "whole_file"]


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError for a file that could not be written, before the work for it."""
    with writing(path):
        exists, has_folder = path.exists(), path.parent.is_dir()
    if exists and not overwrite:
        raise OutputError(
            f"{path.name} is there already", where=str(path), hint="Pass --overwrite."
        )
    if not has_folder:
        raise OutputError(f"there is no folder {path.parent} to write to", where=str(path))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write it meanwhile; it has its name, and is on the disk, after the block.

    Raises OutputError, also for an OSError in the block.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with writing(path):
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
