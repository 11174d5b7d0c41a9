"""One file that appears under its name complete, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dora_convert.errors import OutputError
from dora_convert.storage.header import layout, read_header
from dora_convert.storage.oserrors import writing
from dora_convert.storage.publishing import sync

__all__ = ["check_file", "say_in_header", "whole_file"]


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


def say_in_header(file: Path, metadata: Mapping[str, str]) -> None:
    """Write a finished safetensors file anew, with other text in its header.

    Raises OutputError.
    """
    specs = [ref.spec for ref in read_header(file).values()]
    head = layout(specs, metadata).head
    with whole_file(file) as partial, file.open("rb") as source, partial.open("xb") as target:
        target.write(head)
        source.seek(8 + int.from_bytes(source.read(8), "little"))
        shutil.copyfileobj(source, target)
