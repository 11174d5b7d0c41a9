"""What holds for the output of every command that writes one, and not only for a merge's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.sandbox import digest
from tests.reliability.merges import Merges

# Base and adapter come after the first word, the output last.
COMMANDS: dict[str, tuple[str, ...]] = {
    "merge": ("merge", "--max-shard-size", "18000", "--verify", "none"),
    "merge in 4 bits": ("merge", "--quantize", "nf4", "--residual-rank", "2", "--verify", "none"),
    "to-lora": ("to-lora", "--rank", "4"),
    "to-lora for llama.cpp": ("to-lora", "--rank", "4", "--for", "llama.cpp", "--to", "gguf"),
    "convert": ("convert", "--to", "mlx"),
    "convert to a pickle": ("convert", "--to", "torchtune"),
}


def words(command: str, adapter: Path | str, base: Path | str, out: Path | str) -> list[object]:
    first, *options = COMMANDS[command]
    return [first, adapter, "-b", base, "-o", out, *options]


SLOW = ("merge in 4 bits", "to-lora for llama.cpp", "convert to a pickle")
PARAMS = [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in COMMANDS]


@pytest.fixture(scope="module", params=PARAMS)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(merges: Merges, command: str) -> Merges:
    """`out` was written by the command."""
    merges.clear()
    ended = merges.nursery.run(*words(command, merges.box.adapter, merges.box.base, merges.out))
    assert ended.code == 0, ended
    return merges


def positions(size: int) -> Sequence[int]:
    """The first byte, the last, and some between."""
    return sorted({0, 7, 8, size // 3, size // 2, size - 2, size - 1} & set(range(size)))


def test_every_flipped_byte_is_found(made: Merges) -> None:
    files = [file for file in made.out.rglob("*") if file.is_file()]
    assert len(files) >= 3
    for file in files:
        name = file.relative_to(made.out).as_posix()
        data = file.read_bytes()
        for at in positions(len(data)):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            ended = made.nursery.run("verify", made.out)
            assert ended.code == 7, (name, at, ended)
            assert name in ended.err or name == "SHA256SUMS", (name, at, ended)
        file.write_bytes(data)
    ended = made.nursery.run("verify", made.out)
    assert ended.out == f"ok: {len(files) - 1} files have the sha256 that they were written with\n"


def test_the_same_bytes(made: Merges, command: str, tmp_path: Path) -> None:
    """Of copies with other times, elsewhere, by relative paths, in another environment."""
    for name in ("base", "adapter"):
        shutil.copytree(made.root / name, tmp_path / name)
    for file in tmp_path.rglob("*"):
        os.utime(file, (0, 1_000_000_000))
    variables = {
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "TZ": "Asia/Kathmandu",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),  # noqa: PTH109
    }
    more = [] if command.startswith("convert") else ["--workers", "3"]
    line = [*map(str, words(command, "adapter", "base", "out")), *more]
    subprocess.run(
        [sys.executable, "-m", "dora_convert", *line],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        check=True,
    )
    assert made.files(tmp_path / "out") == made.files(made.out)


def test_an_old_output_is_replaced_whole(made: Merges, command: str) -> None:
    """Or stays as it is, where the work fails at its end."""
    before = made.files(made.out)
    (made.out / "old.txt").write_text("old")
    line = [*words(command, made.box.adapter, made.box.base, made.out), "--overwrite"]
    fault = made.fault(1, "EIO", calls=("fsync",), about="README.md")
    old = digest(made.out)
    assert made.nursery.run(*line, "--json", fault=fault).code == 5
    assert digest(made.out) == old
    shutil.rmtree(made.partial, ignore_errors=True)
    assert made.nursery.run(*line).code == 0
    assert made.files(made.out) == before
    assert {entry.name for entry in made.place.iterdir()} == {"out"}


@pytest.mark.parametrize("name", ["to-lora", "convert"])
def test_killed(merges: Merges, name: str) -> None:
    """At any call that changes a file or a folder: the same command begins anew."""
    line = words(name, merges.box.adapter, merges.box.base, merges.out)
    merges.clear()
    assert merges.nursery.run(*line).code == 0
    whole, kills = merges.files(merges.out), 0
    for point in range(1, 100, 5):
        merges.clear()
        ended = merges.nursery.run(*line, fault=merges.fault(point))
        if ended.code == 0:
            break
        assert ended.code == -9, ended
        if not merges.out.exists():
            assert merges.nursery.run(*line).code == 0
            assert {entry.name for entry in merges.place.iterdir()} == {"out"}
        assert merges.files(merges.out) == whole
        kills += 1
    assert kills > 3
