"""Plug-ins by file name: `formats/peft.py` is the format `peft`; third parties use entry points."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

from dora_convert.errors import UnknownNameError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """The plug-ins of one package, each a module that holds its object under `attribute`.

    If `is_open`, an entry point of the group `package` adds one; it cannot take a built-in name.
    """

    def __init__(self, package: str, attribute: str, *, is_open: bool = True) -> None:
        self._package = package
        self._attribute = attribute
        self._is_open = is_open

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        if not self._is_open:
            return {}
        # Here, because it takes a third of the time that --help takes.
        from importlib.metadata import entry_points  # noqa: PLC0415

        found = entry_points(group=self._package)
        return {e.name: e for e in found if e.name not in self._built_in}

    @cached_property
    def _built_in(self) -> frozenset[str]:
        path = importlib.import_module(self._package).__path__
        return frozenset(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))

    def names(self) -> tuple[str, ...]:
        """All names, sorted; imports no plug-in."""
        return tuple(sorted(self._built_in | self._entry_points.keys()))

    def get(self, name: str) -> T:
        """Import and return one plug-in; raises UnknownNameError with the nearest name."""
        if name in self._built_in:
            module = importlib.import_module(f"{self._package}.{name}")
            plugin: T = getattr(module, self._attribute)
            return plugin
        if name in self._entry_points:
            loaded: T = self._entry_points[name].load()
            return loaded
        names = self.names()
        kind = self._attribute.lower()
        raise UnknownNameError(kind, name, names, difflib.get_close_matches(name, names))
