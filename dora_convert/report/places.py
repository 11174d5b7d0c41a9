"""Where in a model modules are: in which layer, and which of the layer's modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Place", "places"]

_NUMBER = re.compile(r"[0-9]{1,9}")
_ANY = "*"


@dataclass(frozen=True, slots=True)
class Place:
    """`layer` is the first number in a path; modules of a `group` differ in numbers alone."""

    group: str
    layer: int | None


def places(paths: Iterable[str]) -> dict[str, Place]:
    """By path. A group is called by the end of its paths, as much as tells it from the others.

    Of `model.layers.7.self_attn.q_proj` that is `q_proj`, and of BERT's `dense` layers
    `intermediate.dense`, `attention.output.dense` and `layer.*.output.dense`.
    """
    split = {path: path.split(".") for path in paths}
    groups = {path: ".".join(map(_general, parts)) for path, parts in split.items()}
    ends = Counter(end for group in set(groups.values()) for end in _ends(group))

    def place(path: str, parts: list[str]) -> Place:
        numbers = (int(part) for part in parts if _NUMBER.fullmatch(part))
        group = groups[path]
        name = next((end for end in _ends(group) if ends[end] == 1), group)
        return Place(name, next(numbers, None))

    return {path: place(path, parts) for path, parts in split.items()}


def _general(part: str) -> str:
    return _ANY if _NUMBER.fullmatch(part) else part


def _ends(group: str) -> Iterator[str]:
    """Its last part, its last two parts, ...; none that begins with a number."""
    parts = group.split(".")
    for start in range(len(parts) - 1, -1, -1):
        if parts[start] != _ANY:
            yield ".".join(parts[start:])
