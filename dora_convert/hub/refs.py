"""Names of what lies on the Hub: `org/name`, `org/name@revision`, `hf://org/name/folder`."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Ref", "parse_ref"]

_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
# Of `hf://`, a pathlib.Path keeps one slash.
_URL = re.compile(
    rf"hf:/{{1,2}}(?P<repo>{_NAME})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<folder>.+?))?/?"
)
_PLAIN = re.compile(rf"(?P<repo>{_NAME})(?:@(?P<revision>[^@]+))?")


@dataclass(frozen=True, slots=True)
class Ref:
    """A model repository, at a branch, tag or commit of it, or a folder or file in it."""

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.repo}{f'@{self.revision}' * bool(self.revision)}" + (
            f"/{self.folder}" * bool(self.folder)
        )


def parse_ref(text: str) -> Ref | None:
    """What a text names, if it reads like something on the Hub.

    A revision that holds slashes takes the plain form, but for `refs/pr/N`.
    """
    found = _URL.fullmatch(text) or _PLAIN.fullmatch(text)
    if found is None or ".." in text:
        return None
    parts = found.groupdict()
    return Ref(parts["repo"], parts["revision"], parts.get("folder") or "")
