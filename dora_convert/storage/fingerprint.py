"""What a run reads and does, in a form that can be compared with that of an earlier run."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from dora_convert.core.plan import Plan
from dora_convert.errors import InputError
from dora_convert.storage.opening import pread_exactly
from dora_convert.storage.origin import identity
from dora_convert.storage.oserrors import reading

__all__ = ["Fingerprint", "Inputs", "difference", "fingerprint", "inputs_of"]

_HEAD = 1 << 16
_LONGEST_HEAD = 100 << 20


class Fingerprint(TypedDict):
    """Versions and options by name, a mark of every input by its name, and a hash of the plan."""

    versions: dict[str, str]
    options: dict[str, Any]
    inputs: dict[str, list[str]]
    plan: str


class Inputs:
    """The files that a plan reads, as they were when this was made.

    Those of a commit on the Hub never change, though there may not be all of them there yet.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._commits = {file: identity(file) for file in files}
        local = (file for file, commit in self._commits.items() if commit is None)
        self._states = {file: _state(file) for file in local}

    def require_unchanged(self) -> None:
        """Raise InputError if size or time of one of them is another by now."""
        for file, state in self._states.items():
            if _state(file) != state:
                raise InputError(
                    f"{file.name} was changed while it was read",
                    where=str(file),
                    hint="Run the command again once nothing writes to it any more.",
                )

    def marks(self) -> dict[str, list[str]]:
        """By name: its commit on the Hub if it has one, else size, time and a hash of its head."""
        found: dict[str, list[str]] = {}
        for file, commit in self._commits.items():
            found.setdefault(file.name, []).append(commit or _mark(file, self._states[file]))
        return found


def fingerprint(
    plan: Plan, *, versions: Mapping[str, str], options: Mapping[str, Any]
) -> tuple[Fingerprint, Inputs]:
    """Of all that the output's bytes depend on, wherever the inputs lie; and those inputs."""
    text = _Text(plan)
    inputs = Inputs(text.files)
    return {
        "versions": dict(versions),
        "options": {name: _option(value) for name, value in options.items()},
        "inputs": inputs.marks(),
        "plan": text.digest(),
    }, inputs


def inputs_of(plan: Plan) -> Inputs:
    """The files that it reads, as they are now."""
    return Inputs(_Text(plan).files)


def difference(was: Fingerprint, now: Fingerprint) -> str:
    """The first thing that is not the same, as half a sentence."""
    for word, old, new in (
        ("", was["versions"], now["versions"]),
        ("--", was["options"], now["options"]),
    ):
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                shown = word + (name.replace("_", "-") if word else name)
                return f"{shown} was {_shown(old.get(name))}, now it is {_shown(new.get(name))}"
    before, after = was["inputs"], now["inputs"]
    for name in sorted({*before, *after}):
        if name not in after:
            return f"{name} was among its inputs"
        if name not in before:
            return f"{name} is a new input"
        if before[name] != after[name]:
            return f"the input {name} was changed, or is another file"
    return "what it would write is not the same"


def _shown(value: Any) -> str:
    return "not given" if value in (None, [], False) else json.dumps(value).strip('"')


def _option(value: Any) -> Any:
    if isinstance(value, Path):
        return _mark(value, _state(value)) if value.is_file() else str(value)
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if dataclasses.is_dataclass(value):
        return {f.name: _option(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _state(file: Path) -> tuple[int, int]:
    with reading(file):
        found = file.stat()
    return found.st_size, found.st_mtime_ns


def _mark(file: Path, state: tuple[int, int]) -> str:
    size, time = state
    with reading(file), file.open("rb", buffering=0) as stream:
        fd = stream.fileno()
        head = os.pread(fd, _HEAD, 0)
        if file.suffix == ".safetensors":
            length = min(8 + int.from_bytes(head[:8], "little"), size, _LONGEST_HEAD)
            head = pread_exactly(fd, file, length=length, offset=0)
    return f"{size} bytes, {time} ns, {hashlib.sha256(head).hexdigest()}"


class _Text:
    """A plan as text that depends on nothing but what it says; files are numbered as they come."""

    def __init__(self, plan: Plan) -> None:
        self.files: dict[Path, int] = {}
        self._hash = hashlib.sha256()
        for part in (*plan.shards, *plan.documents):
            self._hash.update(json.dumps(self._plain(part)).encode())

    def digest(self) -> str:
        return self._hash.hexdigest()

    def _plain(self, value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case Path():
                return {"file": self.files.setdefault(value, len(self.files))}
            case enum.Enum():
                return value.name
            case Mapping():
                return [[self._plain(key), self._plain(value[key])] for key in sorted(value)]
            case tuple() | list():
                return [self._plain(item) for item in value]
            case _:
                fields = (getattr(value, f.name) for f in dataclasses.fields(value))
                return [type(value).__name__, *(self._plain(field) for field in fields)]
