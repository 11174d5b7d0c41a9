"""Memory of quantised output: it grows with neither the depth nor the size of a tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quant.engine import WRITABLE

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
# Of files that are large, so much waits for the hash and the disk; the small model has none.
CHUNKS = 32 * MIB
# What allocators keep differs from run to run, most where blocks are large. The models differ by
# 300 MiB, of which a quarter would be seen; a copy of the largest tensor is 112 MiB or more.
DEEP, LARGE = 40 * MIB + CHUNKS, 96 * MIB + CHUNKS
# A tile of `fp8` has 128 rows, of which neither thread can hold fewer: W, W' and what the survival
# compares, in float32.
WIDE, HEIGHT = 28 * 1024, {"fp8": 128}

MAKE = """
import sys
from pathlib import Path
from llama import Shape, make
layers, hidden, wide = map(int, sys.argv[2:])
make(Path(sys.argv[1]), Shape(layers, hidden, wide, heads=8, kv_heads=8, head_dim=128, vocab=256))
"""

# The peak is that of a process that has done as much before, so that only growth is left.
MEASURE = """
import json, re, sys, threading
from pathlib import Path
from dora_convert import api

scheme, *folders = sys.argv[1:]
status, peak, over = Path("/proc/self/status"), 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.002):
        held = re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+)", status.read_text())
        peak = max(peak, 1024 * sum(map(int, held)))

threading.Thread(target=watch, daemon=True).start()
peaks = []
for folder in map(Path, folders):
    peak = 0
    how = api.MergeOptions(quantize=scheme, workers=2, overwrite=True)
    api.merge(folder / "adapter", folder.parent / f"out-{scheme}", base=folder / "base", how=how)
    peaks.append(peak)
over.set()
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small ones, a deep one and one of few large tensors, each of about 350 MiB."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = {"first": (1, 1024, 2048), "small": (1, 1024, 2048)}
    sizes |= {"deep": (18, 1024, 2048), "large": (1, 2048, WIDE)}
    for name, size in sizes.items():
        python(MAKE, folder / name, *size)
    return [folder / name for name in sizes]


def python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "benchmarks",
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scheme", WRITABLE)
def test_it_is_flat(scheme: str, models: list[Path]) -> None:
    _, small, deep, large = json.loads(python(MEASURE, scheme, *models))
    tiles = 2 * 6 * 4 * WIDE * HEIGHT.get(scheme, 1)
    assert deep < small + DEEP, [n // MIB for n in (small, deep)]
    assert large < small + LARGE + tiles, [n // MIB for n in (small, large)]
