"""Patterns of tensor names with placeholders, matched in linear time and filled in again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["MODULE", "NamePattern"]

MODULE: Final = "module"
_MOST = 4  # optional parts; each doubles the number of expressions
_LONGEST = 500
_TOKEN = re.compile(r"\{(?P<field>\w*)\}|(?P<mark>[{}\[\]])|(?P<text>[^{}\[\]]+)")
_FIELD = re.compile(r"[A-Za-z_]\w*")

# A literal, or a placeholder as a tuple of its name.
_Token = str | tuple[str]
_Segment = tuple[tuple[_Token, ...], bool]  # with whether it is optional


@dataclass(frozen=True, slots=True)
class NamePattern:
    """`"{module}.lora_A[.{adapter}].weight"`: placeholders in braces, optional parts in brackets.

    `{module}` stands for a path of one or more pieces, every other placeholder for something
    within one piece, without a dot. Two placeholders always have a dot between them, so no text
    is tried twice and an expression from a foreign file cannot hang.
    """

    text: str
    _segments: tuple[_Segment, ...]
    _expressions: tuple[re.Pattern[str], ...]

    @classmethod
    def parse(cls, text: str) -> NamePattern:
        """Raises ValueError with what is wrong."""
        if not text or not text.isprintable() or len(text) > _LONGEST:
            raise ValueError(f"a pattern is 1 to {_LONGEST} printable characters")
        segments = tuple(_segments(text))
        fields = [token[0] for part, _ in segments for token in part if isinstance(token, tuple)]
        for field in fields:
            if fields.count(field) > 1:
                raise ValueError(f"{{{field}}} comes twice")
        optional = [i for i, (_, is_optional) in enumerate(segments) if is_optional]
        if len(optional) > _MOST:
            raise ValueError(f"has more than {_MOST} optional parts")
        expressions = []
        for count in range(len(optional) + 1):
            for chosen in itertools.combinations(optional, count):
                tokens = [
                    token
                    for i, (part, is_optional) in enumerate(segments)
                    if not is_optional or i in chosen
                    for token in part
                ]
                expressions.append(_expression(tokens))
        return cls(text, segments, tuple(expressions))

    @property
    def required(self) -> frozenset[str]:
        """The placeholders that every name has."""
        return frozenset(
            token[0]
            for part, is_optional in self._segments
            if not is_optional
            for token in part
            if isinstance(token, tuple)
        )

    @property
    def is_optional(self) -> bool:
        """Whether some part of it may be left out."""
        return any(is_optional for _, is_optional in self._segments)

    def match(self, name: str) -> Mapping[str, str] | None:
        """What the placeholders stand for in this name, or None; shorter forms are tried first."""
        for expression in self._expressions:
            found = expression.fullmatch(name)
            if found is not None:
                return found.groupdict()
        return None

    def fill(self, values: Mapping[str, str]) -> str | None:
        """The name without its optional parts, or None where a value is not known."""
        if not self.required <= values.keys():
            return None
        return "".join(
            token if isinstance(token, str) else values[token[0]]
            for part, is_optional in self._segments
            if not is_optional
            for token in part
        )


def _segments(text: str) -> Iterator[_Segment]:
    tokens: list[_Token] = []
    is_open = False
    for found in _TOKEN.finditer(text):
        mark = found["mark"]
        if found["text"] is not None:
            tokens.append(found["text"])
        elif mark is None:
            if _FIELD.fullmatch(found["field"]) is None:
                raise ValueError(f"{found[0]!r} is no placeholder: write a name in the braces")
            tokens.append((found["field"],))
        elif mark in "{}":
            raise ValueError(f"has a {mark!r} without its other half")
        elif is_open == (mark == "["):
            raise ValueError("has brackets that do not pair up; they cannot be nested")
        else:
            if tokens:
                yield tuple(tokens), is_open
            tokens, is_open = [], not is_open
    if is_open:
        raise ValueError("has brackets that do not pair up; they cannot be nested")
    if tokens:
        yield tuple(tokens), False


def _expression(tokens: list[_Token]) -> re.Pattern[str]:
    pieces = []
    needs_dot = False
    for token in tokens:
        if isinstance(token, str):
            pieces.append(re.escape(token))
            needs_dot = needs_dot and "." not in token
            continue
        if needs_dot:
            raise ValueError(f"{{{token[0]}}} needs a dot between it and the placeholder before it")
        pieces.append(f"(?P<{token[0]}>{'.+' if token[0] == MODULE else '[^.]+'})")
        needs_dot = True
    return re.compile("".join(pieces), re.DOTALL)
