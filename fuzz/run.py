"""Fuzz one parser, guided by coverage: `python fuzz/run.py TARGET [libFuzzer options]`."""

from __future__ import annotations

import random
import shutil
import sys
from functools import partial
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dora_convert", "tomllib", "zipfile"]):
    from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Run until a bad input is found, or until the given options say that it is enough."""
    name, *options = sys.argv[1:]
    # Not a temporary one: the fuzzer ends the process without a chance to remove it.
    folder = Path("/dev/shm") / f"dora-convert-fuzz-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    new = folder / "new"
    new.mkdir(parents=True)
    command = [sys.argv[0], str(new), str(CORPUS / name), *options]
    mutator = {"custom_mutator": _with_length} if name == "header" else {}
    atheris.Setup(command, partial(TARGETS[name], folder=folder), **mutator)
    atheris.Fuzz()


def _with_length(data: bytes, size: int, seed: int) -> bytes:
    """Mostly with a first number that is right, or nearly nothing would get past it."""
    if random.Random(seed).randrange(8) == 0:
        return atheris.Mutate(data, size)
    body = atheris.Mutate(data[8:], max(size - 8, 1))
    return (body.rfind(b"}") + 1).to_bytes(8, "little") + body


if __name__ == "__main__":
    main()
