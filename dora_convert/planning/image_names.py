"""From one of the two schemes of names that image and video models are stored in to the other.

A model is published by its authors in names of their own, and by diffusers in those of its classes;
adapters are trained on either. What is what is data, taken from the converters of diffusers
(diffusers/loaders/single_file_utils.py); here it is applied to what is stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dora_convert.planning.image_ldm import OPEN_CLIPS, UNET
from dora_convert.planning.image_rules import Group, Made
from dora_convert.planning.image_transformers import TRANSFORMERS
from dora_convert.planning.names import Origin, Rows, Unsupported

__all__ = ["other_names"]

_Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Link:
    """A tensor in its authors' names, and those of diffusers that it is made of."""

    original: str
    parts: tuple[str, ...]
    made: Made


def other_names(shapes: _Shapes) -> dict[str, Origin]:
    """Every tensor of one model as the other scheme calls it, and the stored rows it is made of.

    `shapes` holds the tensors of one denoiser or text encoder, without a prefix for it. Empty for
    models that are not known. Names that both schemes share are left out, and so is what has not
    the shape that it should have.
    """
    for known in (UNET, *OPEN_CLIPS, *TRANSFORMERS):
        for is_original, marks in ((True, known.original), (False, known.diffusers)):
            if all(mark in shapes for mark in marks):
                more = known.more(shapes, is_original)
                groups = (Group("", "", known.top), *known.groups, *more)
                out: dict[str, Origin] = {}
                for link in _links(groups, shapes, is_original):
                    out |= _resolved(link, shapes, is_original)
                return {name: origin for name, origin in out.items() if name not in shapes}
    return {}


def _links(groups: Iterable[Group], shapes: _Shapes, is_original: bool) -> Iterable[_Link]:
    """All that the rules say about tensors that may be stored."""
    found = {}
    for group in groups:
        for number in _numbers(group.original if is_original else group.diffusers, shapes):
            theirs, ours = (
                re.sub(r"[#$]", number, f"{prefix}." if prefix else "")
                for prefix in (group.original, group.diffusers)
            )
            for name, rule in _spelled(group, theirs if is_original else ours, shapes).items():
                made = rule if isinstance(rule, Made) else Made(rule)
                for leaf in ("", ".weight", ".bias"):
                    parts = tuple(ours + part + leaf for part in made.parts.split())
                    link = _Link(theirs + name + leaf, parts, made)
                    found[link.original, parts] = link
    return found.values()


def _numbers(prefix: str, shapes: _Shapes) -> list[str]:
    """What the sign in a prefix stands for; it is the same without one."""
    before, sign, after = re.split(r"([#$]|\Z)", prefix, maxsplit=1)
    if not sign:
        return [""]
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}\.")
    numbers = sorted({int(match[1]) for match in map(pattern.match, shapes) if match})
    return [str(number) for number in (numbers[-1:] if sign == "$" else numbers)]


def _spelled(group: Group, prefix: str, shapes: _Shapes) -> Mapping[str, str | Made]:
    """The rules of a group; where all is the same, one for each name below the prefix."""
    if "*" not in group.rules:
        return group.rules
    below = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
    return dict(zip(below, below, strict=True))


def _resolved(link: _Link, shapes: _Shapes, is_original: bool) -> dict[str, Origin]:
    stored = (link.original,) if is_original else link.parts
    if any(name not in shapes for name in stored):
        return {}
    if len(link.parts) > 1:
        return _cut(link, shapes) if is_original else _joined(link, shapes)
    asked = link.parts[0] if is_original else link.original
    (name,) = stored
    rows = _rows(name, shapes)
    if link.made.transposed:
        return {asked: Unsupported(f"it is made of {name} by swapping axes")}
    if not link.made.swapped:
        return {asked: (Rows(name, 0, rows),)}
    half, rest = divmod(rows, 2)
    return {} if rest else {asked: (Rows(name, half, rows), Rows(name, 0, half))}


def _cut(link: _Link, shapes: _Shapes) -> dict[str, Origin]:
    name = link.original
    out: dict[str, Origin] = {}
    start = 0
    heights = _heights(link, _rows(name, shapes), _columns(name, shapes))
    for part, height in zip(link.parts, heights, strict=False):
        out[part] = (Rows(name, start, start + height),)
        start += height
    return out


def _joined(link: _Link, shapes: _Shapes) -> dict[str, Origin]:
    heights = [_rows(part, shapes) for part in link.parts]
    expected = _heights(link, sum(heights), _columns(link.parts[0], shapes))
    if heights != expected or len({shapes[part][1:] for part in link.parts}) > 1:
        return {}
    rows = zip(link.parts, heights, strict=True)
    return {link.original: tuple(Rows(part, 0, height) for part, height in rows)}


def _heights(link: _Link, rows: int, columns: int) -> list[int]:
    """Rows of each part of a tensor of so many; none where that cannot be."""
    count, square = len(link.parts), link.made.square
    height, over = divmod(rows - square * columns, count - square)
    if over or height <= 0 or (square and not columns):
        return []
    return [columns] * square + [height] * (count - square)


def _rows(name: str, shapes: _Shapes) -> int:
    return shapes[name][0] if shapes[name] else 1


def _columns(name: str, shapes: _Shapes) -> int:
    """Of a weight, or of that beside a bias."""
    shape = shapes.get(re.sub(r"\bbias$", "weight", name), ())
    return shape[1] if len(shape) > 1 else 0
