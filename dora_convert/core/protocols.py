"""The interfaces to implement in order to extend the tool."""

from __future__ import annotations

from typing import Protocol

from dora_convert.core.adapter import Adapter, MagnitudeAxis
from dora_convert.core.bundle import Bundle

__all__ = ["AdapterFormat", "Listener"]


class AdapterFormat(Protocol):
    """One layout of adapter files; `formats/NAME.py` holds one as `FORMAT`."""

    title: str

    def detect(self, bundle: Bundle) -> bool:
        """Whether the files are of this format; at most one format may say so."""
        ...

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """Canonical layout, scaling resolved, every tensor accounted for.

        `axis` is the user's word on what a magnitude belongs to, where format and shape do not
        decide. Raises InputError with all that is wrong, at once.
        """
        ...


class Listener(Protocol):
    """Told how a run goes; may be called from several threads."""

    def started(self, nbytes: int) -> None:
        """So many bytes of output are to be written."""
        ...

    def advanced(self, nbytes: int) -> None:
        """So many bytes of output more are written."""
        ...

    def sealed(self, file: str) -> None:
        """A shard is complete on disk."""
        ...
