"""Packages that are not installed with this one, but by an extra of it."""

from __future__ import annotations

import importlib
from types import ModuleType

from dora_convert.errors import InputError

__all__ = ["required"]


def required(package: str, extra: str, purpose: str) -> ModuleType:
    """Import a package that `purpose` needs; raises InputError with what installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs {package}, which is not installed",
            hint=f'pip install "dora-convert[{extra}]"',
        ) from error
