"""SHA256SUMS: what coreutils' own program makes of it, and every byte that may change."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dora_convert.errors import InputError
from dora_convert.storage.digest import file_sha256
from dora_convert.storage.sums import SUMS, changed_files, has_sums, write_sums

NAMES = ["model.safetensors", "2_Dense/config.json", "a\\b", "new\nline", "caf\udce9", " x "]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    (out / "2_Dense").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (out / name).write_bytes(bytes([i]) * 50)
    write_sums(out, {})
    return out


def changed(output: Path) -> list[str]:
    return [line.partition(": ")[0] for line in changed_files(output, workers=2)[1]]


def test_hash(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(3_000_000))
    assert file_sha256(file) == hashlib.sha256(bytes(3_000_000)).hexdigest()


def test_as_coreutils_has_it(output: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("there is no sha256sum here")
    check = [program, "--check", "--strict", SUMS]
    assert subprocess.run(check, cwd=output, capture_output=True, check=False).returncode == 0
    written = subprocess.run(
        [program, *sorted(map(os.fsencode, NAMES), key=os.fsdecode)],
        cwd=output,
        capture_output=True,
        check=True,
    )
    assert (output / SUMS).read_bytes() == written.stdout


def test_unchanged(output: Path) -> None:
    assert has_sums(output)
    assert changed_files(output, workers=2) == (len(NAMES), [])
    assert not has_sums(output / "2_Dense")


def test_known_hashes_are_not_made_again(output: Path) -> None:
    known = dict.fromkeys(["model.safetensors"], "0" * 64)
    (output / SUMS).unlink()
    write_sums(output, known)
    assert (output / SUMS).read_bytes().count(b"0" * 64) == 1
    assert changed(output) == ["model.safetensors"]


def test_every_byte_of_every_file(output: Path) -> None:
    """And of the list itself, where one bit makes a small letter of a large one."""
    for name in (*NAMES, SUMS):
        file = output / name
        data = file.read_bytes()
        for index in range(len(data)):
            for bit in {index % 8, 5} if name == SUMS else {index % 8}:
                other = bytearray(data)
                other[index] ^= 1 << bit
                file.write_bytes(other)
                found = changed(output)
                assert found, (name, index, bit)
                if name != SUMS:
                    assert found == [name]
        file.write_bytes(data)
    assert changed(output) == []


def test_missing(output: Path) -> None:
    (output / NAMES[0]).unlink()
    (output / NAMES[1]).unlink()
    (output / NAMES[1]).symlink_to("/etc/hostname")
    assert changed(output) == [NAMES[1], NAMES[0]]


def test_empty_list(output: Path) -> None:
    (output / SUMS).write_bytes(b"")
    with pytest.raises(InputError, match="SHA256SUMS is empty"):
        changed(output)
