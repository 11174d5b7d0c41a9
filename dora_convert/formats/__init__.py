"""One adapter layout a file, as code or as a description; which of them a folder holds is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dora_convert.core.bundle import Bundle
from dora_convert.core.protocols import AdapterFormat
from dora_convert.core.spec.format import SpecFormat
from dora_convert.core.spec.parsing import parse
from dora_convert.errors import InputError
from dora_convert.registry import Registry

__all__ = ["detect", "example_spec", "formats"]


def _described(file: Path) -> AdapterFormat:
    return SpecFormat(parse(file.read_text("utf-8"), name=file.stem, file=file.name))


formats: Registry[AdapterFormat] = Registry("dora_convert.formats", "FORMAT", load=_described)


def example_spec() -> str:
    """A description with every key of the language, commented."""
    return (Path(__file__).parent / "_example.toml").read_text("utf-8")


def detect(bundle: Bundle, names: Sequence[str] | None = None) -> str:
    """The one format that recognises the files.

    Raises InputError where none does, or more than one.
    """
    known = formats.names() if names is None else names
    found = [name for name in known if formats.get(name).detect(bundle)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"more than one adapter format fits: {', '.join(found)}",
            where=str(bundle.root),
            hint=f"Say which it is: --format {found[0]}",
        )
    sample = ", ".join(sorted(bundle.tensors)[:3]) or "none"
    raise InputError(
        "these files are not an adapter in a known format",
        where=(str(bundle.root), f"tensors: {sample}"),
        hint=f"Known formats: {', '.join(known)}. Is this the adapter's folder? "
        "A layout of your own is described with --spec FILE.",
    )
