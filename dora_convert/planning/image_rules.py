"""How tables say what tensors of one model are called by its authors and by diffusers.

They are read in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

__all__ = ["SAME", "Architecture", "Group", "Made", "Rules"]


@dataclass(frozen=True, slots=True)
class Made:
    """How tensors of diffusers, written with spaces between, make one of the authors'."""

    parts: str  # each below the one before it
    square: int = 0  # so many of the first have as many rows as columns; the others are of one size
    swapped: bool = False  # its second half comes first
    transposed: bool = False


# From the authors' names to those of diffusers. A name is that of a tensor, or of a module with a
# weight and maybe a bias.
Rules: TypeAlias = Mapping[str, str | Made]

# Whatever is there has one name in both.
SAME: Rules = {"*": "*"}


class Group(NamedTuple):
    """Rules for names below a prefix; in it `#` is any number, and `$` the last there is.

    A later group has the last word on a pair of names.
    """

    original: str
    diffusers: str
    rules: Rules


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model; all of its marks are among the names of any such model."""

    original: tuple[str, ...]
    diffusers: tuple[str, ...]
    top: Rules
    groups: tuple[Group, ...]
    # Those that depend on the names there are; are they the authors'?
    more: Callable[[Iterable[str], bool], Iterable[Group]] = lambda _names, _original: ()
