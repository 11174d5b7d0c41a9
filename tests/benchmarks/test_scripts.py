"""Every benchmark runs, on models too small to say anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "merge.py --tiny --rounds 1",
        "merge.py --tiny --rounds 1 --depth 1,2 --skip-peft 2",
        "quantise.py --tiny --rounds 1 --schemes w8a8,w4a16,nf4 --whole-model",
        "to_lora.py --tiny --rounds 1 --ranks 4 --depth 1,2",
        "to_lora_7b.py --tiny --layers 2",
        "peers.py --tiny --rounds 1 --layers 1",
        "image.py --tiny --rounds 1",
    ],
)
def test_it_runs(command: str, tmp_path: Path) -> None:
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, FOLDER / script, *options, "--dir", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=FOLDER,
    )
    assert done.returncode == 0, done.stderr
    assert "| ---" in done.stdout
