"""Plug-ins by file name: `formats/peft.py` is the format `peft`; third parties use entry points."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
from functools import cached_property
from typing import Generic, TypeVar

from dora_convert.errors import UnknownNameError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """The plug-ins of one package, each a module that holds its object under `attribute`.

    An entry point of the group `package` adds one; it may not take a built-in name.
    """

    def __init__(self, package: str, attribute: str) -> None:
        self._package = package
        self._attribute = attribute

    @cached_property
    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        found = importlib.metadata.entry_points(group=self._package)
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
