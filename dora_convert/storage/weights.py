"""The weight files of a folder: one, several, or those that an index names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError
from dora_convert.storage.documents import read_json
from dora_convert.storage.folders import is_plain_name, leaves, require_inside
from dora_convert.storage.gguf import GgufFile, read_gguf
from dora_convert.storage.header import read_header
from dora_convert.storage.opening import quoted

__all__ = [
    "GGUF",
    "PICKLES",
    "Weights",
    "is_shard",
    "missing_shards",
    "raise_faults",
    "read_indexed",
    "read_weights",
    "refuse_pickle",
    "shard_stem",
    "some",
]

GGUF = ".gguf"
PICKLES = (".bin", ".pt", ".pth")
_INDEX_LIMIT = 32 << 20
_MAX_SHARDS = 10_000
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})(?P<suffix>\.\w+)")


@dataclass(slots=True)
class Weights:
    """Tensors by name, the file of each, what each file holds, and all that is wrong.

    `gguf` is what the heads of GGUF files say besides.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    held: dict[str, set[str]] = field(default_factory=dict)
    gguf: list[GgufFile] = field(default_factory=list)
    faults: list[InputError] = field(default_factory=list)


def read_weights(root: Path, files: Iterable[str]) -> Weights:
    """Read the headers of these files in `root`, going on after a fault."""
    weights = Weights()
    twice: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files:
        try:
            refs = _read(root, file, weights)
        except InputError as fault:
            weights.faults.append(fault)
            continue
        weights.held[file] = set(refs)
        for name, ref in refs.items():
            if name in weights.tensors:
                twice[weights.shards[name], file].append(quoted(name))
            else:
                weights.tensors[name] = ref
                weights.shards[name] = file
    for (first, second), names in twice.items():
        _note(weights, f"{first} and {second} both hold {some(names)}")
    return weights


def read_indexed(root: Path, index: str) -> Weights:
    """Read the files that `index` names, and hold what they contain against it."""
    expected: dict[str, set[str]] = defaultdict(set)
    for name, file in _weight_map(root / index).items():
        expected[file].add(name)
    single = index.removesuffix(".index.json")
    suffix = Path(single).suffix
    refused = {file: reason for file in expected if (reason := _refusal(root, file, suffix))}
    weights = read_weights(root, sorted(set(expected) - set(refused)))
    for file, reason in refused.items():
        _note(weights, f"{index} names {quoted(file)}, {reason}")
    for file, held in weights.held.items():
        if absent := expected[file] - held:
            names = some(map(quoted, sorted(absent)))
            _note(weights, f"{file} does not hold what {index} says it does: {names}")
        if unnamed := held - expected[file]:
            names = some(map(quoted, sorted(unnamed)))
            _note(
                weights, f"{index} is stale: {file} holds tensors it does not name there: {names}"
            )
    if single not in expected and (root / single).exists():
        _note(
            weights, f"{single} is there beside {index}, which does not name it: delete one of them"
        )
    return weights


def is_shard(file: str) -> bool:
    """Whether a file is numbered as one of several, `NAME-00001-of-00003.safetensors`."""
    return _SHARD.fullmatch(file) is not None


def shard_stem(file: str) -> str | None:
    """`NAME` of `NAME-00001-of-00003.gguf`; None for a file that is not numbered so."""
    match = _SHARD.fullmatch(file)
    return match["stem"] if match else None


def missing_shards(files: Sequence[str]) -> list[InputError]:
    """Say which numbered shards are not among `files`."""
    found: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for file in files:
        if match := _SHARD.fullmatch(file):
            key = match["stem"], match["count"], match["suffix"]
            found[key][int(match["number"])] = file
    faults = []
    for (stem, count, suffix), numbers in found.items():
        wanted = range(1, int(count) + 1)
        lacking = [
            f"{stem}-{i:0{len(count)}}-of-{count}{suffix}" for i in wanted if i not in numbers
        ]
        if lacking:
            what = f"{len(lacking)} of {len(wanted)} shards are missing: {some(lacking)}"
            faults.append(InputError(what, hint="Download the missing files."))
        faults += [
            InputError(f"{file} has a number that does not exist in a set of {len(wanted)}")
            for i, file in numbers.items()
            if i not in wanted
        ]
    return faults


def refuse_pickle(file: Path) -> NoReturn:
    """Raise the InputError for a pickle that was not allowed."""
    what = f"the weights are in {file.name}, a pickle: a format that can carry programs"
    hint = (
        "If you trust where it comes from, pass --allow-pickle. It is then read without running "
        "anything in it."
    )
    raise InputError(what, where=str(file), hint=hint)


def raise_faults(root: Path, faults: Sequence[InputError]) -> None:
    """Raise all faults as one InputError, if there are any."""
    if not faults:
        return
    if len(faults) == 1 and faults[0].where:
        raise faults[0]
    things = "one thing is" if len(faults) == 1 else f"{len(faults)} things are"
    what = f"{things} wrong with the files in {root.name or root}"
    hint = next((fault.hint for fault in faults if fault.hint), "")
    problems = [problem for fault in faults for problem in (fault.what, *fault.problems)]
    raise InputError(what, where=str(root), problems=problems, hint=hint)


def some(names: Iterable[str], limit: int = 8) -> str:
    """Join the first names, and count the others."""
    known = list(names)
    rest = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + rest


def _read(root: Path, file: str, weights: Weights) -> Mapping[str, TensorRef]:
    path = root / file
    require_inside(root, path)
    if path.suffix == GGUF:
        weights.gguf.append(read_gguf(path))
        return weights.gguf[-1].tensors
    if path.suffix in PICKLES:
        from dora_convert.storage import pickled  # noqa: PLC0415 - it imports torch

        return pickled.read_pickle_header(path)
    return read_header(path)


def _weight_map(index: Path) -> dict[str, str]:
    require_inside(index.parent, index)
    places = read_json(index, limit=_INDEX_LIMIT).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        what = f"{index.name} has no weight_map from tensor names to file names"
        raise InputError(what, where=str(index))
    if not places:
        raise InputError(f"{index.name} names no tensor", where=str(index))
    if len(set(places.values())) > _MAX_SHARDS:
        raise InputError(f"{index.name} names more than {_MAX_SHARDS} files", where=str(index))
    return places


def _refusal(root: Path, file: str, suffix: str) -> str:
    """Say why a file that an index names is not even opened."""
    if not is_plain_name(file):
        return "which is not a plain file name"
    if not file.endswith(suffix):
        return f"which is not a {suffix} file"
    if leaves(root, root / file):
        return "which is a link to a file outside of the folder"
    if not os.path.exists(root / file):  # noqa: PTH110 - false, not an error, in all cases
        return "which is not there"
    return ""


def _note(weights: Weights, what: str) -> None:
    weights.faults.append(InputError(what))
