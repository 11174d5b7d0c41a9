"""Draw time and memory against the size of the model, from what `merge.py --depth` wrote.

`python benchmarks/merge.py --depth 4,16,64 --json depth.json`, then
`python benchmarks/plot.py depth.json benchmarks/depth.svg`. Needs the extra `plot`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
from merge import CP, CP_SYNC, MIB, OURS

GB = 1e9


def draw(report: dict[str, Any], target: Path) -> None:
    """Medians of every command on the left, peaks of memory on the right; both from zero."""
    # Neither the date nor random ids, so that a file changes only with its figures.
    plt.rcParams.update({"svg.hashsalt": "depth", "svg.fonttype": "none", "font.size": 9})
    figure, (time, memory) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    cases = report["cases"]
    sizes = [case["bytes"] / GB for case in cases]
    for name in (OURS, CP_SYNC, CP):
        middle = [median(run["seconds"] for run in case["runs"][name]) for case in cases]
        time.plot(sizes, middle, marker="o", label=name)
    floor = report["torch_only_bytes"] / MIB
    peaks = [max(run["own_peak_bytes"] for run in case["runs"][OURS]) / MIB for case in cases]
    memory.plot(sizes, peaks, marker="o", label=OURS)
    memory.axhline(floor, linestyle=":", color="gray", label="importing torch")
    for axes, what in ((time, "seconds, whole process"), (memory, "own memory, MiB")):
        axes.set(xlabel="model, GB of bf16", ylabel=what, xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.report.read_text()), options.target)


if __name__ == "__main__":
    main()
