"""The same bytes, whoever makes them, where and when."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.merges import Merges


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers(merges: Merges, workers: int) -> None:
    merges.clear()
    assert merges.run("--workers", workers).code == 0
    assert merges.files(merges.out) == merges.expected


def test_everything_else(merges: Merges, tmp_path: Path) -> None:
    """Copies of the inputs with other times, elsewhere, by relative paths, another environment."""
    for name in ("base", "adapter"):
        shutil.copytree(merges.root / name, tmp_path / name)
    for file in tmp_path.rglob("*"):
        os.utime(file, (0, 1_000_000_000))
    command = ["-m", "dora_convert", "merge", "adapter", "-b", "base", "-o", "out"]
    command += ["--max-shard-size", "18000", "--verify", "none"]
    variables = {
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "TZ": "Asia/Kathmandu",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),  # noqa: PTH109
    }
    subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        check=True,
    )
    assert merges.files(tmp_path / "out") == merges.expected
