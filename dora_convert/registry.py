"""Plug-ins by file name: `formats/peft.py` is the format `peft`, and so is `formats/mlx.toml`.

Third parties use entry points.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from dora_convert.errors import UnknownNameError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """The plug-ins of one package, each a module that holds its object under `attribute`.

    If `is_open`, an entry point of the group `package` adds one; it cannot take a built-in name.
    `load` makes an object of a TOML file, for plug-ins that are data.
    """

    def __init__(
        self,
        package: str,
        attribute: str,
        *,
        is_open: bool = True,
        load: Callable[[Path], T] | None = None,
    ) -> None:
        self._package = package
        self._attribute = attribute
        self._is_open = is_open
        self._load = load
        self._loaded: dict[str, T] = {}

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        if not self._is_open:
            return {}
        # Here, because it takes a third of the time that --help takes.
        from importlib.metadata import entry_points  # noqa: PLC0415

        found = entry_points(group=self._package)
        built_in = self._modules | self._files.keys()
        return {e.name: e for e in found if e.name not in built_in}

    @cached_property
    def _modules(self) -> frozenset[str]:
        names = (name for folder in self._folders for name in _listed(folder))
        plain = (name for name in names if name.endswith(".py") and not name.startswith("_"))
        return frozenset(name.removesuffix(".py") for name in plain)

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        if self._load is None:
            return {}
        files = (file for folder in self._folders for file in Path(folder).glob("[!_]*.toml"))
        return {file.stem: file for file in files}

    @property
    def _folders(self) -> list[str]:
        return list(importlib.import_module(self._package).__path__)

    def names(self) -> tuple[str, ...]:
        """All names, sorted; imports no plug-in."""
        return tuple(sorted(self._modules | self._files.keys() | self._entry_points.keys()))

    def get(self, name: str) -> T:
        """Import and return one plug-in; raises UnknownNameError with the nearest name."""
        if name in self._modules:
            module = importlib.import_module(f"{self._package}.{name}")
            plugin: T = getattr(module, self._attribute)
            return plugin
        if name in self._files and self._load is not None:
            if name not in self._loaded:
                self._loaded[name] = self._load(self._files[name])
            return self._loaded[name]
        if name in self._entry_points:
            loaded: T = self._entry_points[name].load()
            return loaded
        names = self.names()
        kind = self._attribute.lower()
        raise UnknownNameError(kind, name, names, difflib.get_close_matches(name, names))


def _listed(folder: str) -> list[str]:
    """Names in a folder. Not by pkgutil, which takes one that cannot be read for an empty one."""
    try:
        return os.listdir(folder)  # noqa: PTH208 - names are all that is wanted
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        raise
