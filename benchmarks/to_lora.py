"""Time `to-lora` on a Llama-1B-shaped adapter against PEFT and full decompositions.

`python benchmarks/to_lora.py`: ranks 16 and 64; see README.md here. The others take minutes for one
layer and are run on a model of one layer; dora-convert is run on that too, and on all layers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import llama
from measure import Measured, run
from merge import MIB, TORCH_ONLY, check_space, machine, say, table

Command = list[str | Path]


def ours(base: Path, adapter: Path, rank: int, out: Path) -> Command:
    """No text but the result; a new output."""
    shutil.rmtree(out, ignore_errors=True)
    command: Command = [sys.executable, "-m", "dora_convert", "to-lora", adapter, "-b", base]
    return [*command, "-o", out, "--rank", str(rank), "--for", "peft", "--json"]


def timed(base: Path, adapter: Path, rank: int, out: Path, rounds: int) -> list[Measured]:
    runs = [run(ours(base, adapter, rank, out)) for _ in range(rounds)]
    sampled = run(ours(base, adapter, rank, out), sampled=True)
    return [replace(runs[0], own_peak=sampled.own_peak), *runs[1:]]


def compare(folder: Path, shape: llama.Shape, rank: int) -> dict[str, Any]:
    """One layer: seconds and what is missed, of PEFT, of full decompositions, and of ours."""
    one = replace(shape, layers=1)
    base, adapter = llama.make(folder / "one", one)
    out = folder / "lora-one"
    mine = run(ours(base, adapter, rank, out))
    child = Path(__file__).with_name("peft_to_lora.py")
    others = run([sys.executable, child, base, adapter, str(rank), out])
    found: dict[str, Any] = json.loads(others.stdout)
    found["ours"]["seconds"] = mine.seconds
    return found


def bench(folder: Path, depths: Sequence[int], ranks: Sequence[int], arguments: Any) -> str:
    shape = llama.TINY if arguments.tiny else llama.LLAMA_1B
    floor = run(TORCH_ONLY, sampled=True).own_peak
    rows: list[list[str]] = []
    sizes: list[list[str]] = []
    results: dict[str, Any] = {"machine": machine(folder)}
    for rank in ranks:
        one = compare(folder, shape, rank)
        say(f"rank {rank}, one layer: {json.dumps(one)}")
        runs: dict[int, list[Measured]] = {}
        for depth in depths:
            deep = replace(shape, layers=depth)
            base, adapter = llama.make(folder / str(depth), deep)
            out = folder / "lora"
            runs[depth] = timed(base, adapter, rank, out, arguments.rounds)
            seconds = median(r.seconds for r in runs[depth])
            peak = max(r.own_peak for r in runs[depth])
            say(f"rank {rank}, {depth} layers: {seconds:.1f} s, {peak / MIB:.0f} MiB")
            above = f"{(peak - floor) / MIB:.0f}"
            each = ", ".join(f"{r.seconds:.1f}" for r in runs[depth])
            sizes.append([f"{rank}", f"{depth}", each, f"{seconds:.1f}", above])
        deepest = max(depths)
        whole = median(r.seconds for r in runs[deepest])
        for name, label in (("peft", "PEFT convert_to_lora"), ("svd", "full SVD")):
            seconds = one[name]["seconds"]
            rows.append(
                [
                    f"{label}, rank {rank}",
                    f"{seconds:.1f}",
                    f"{seconds * deepest:.0f}",
                    f"{seconds * deepest / whole:.0f}",
                    f"{one[name]['missed']:.2%}",
                ]
            )
        mine = one["ours"]
        rows.append(
            [
                f"dora-convert, rank {rank}",
                f"{mine['seconds']:.1f}",
                f"{whole:.1f}",
                "1",
                f"{mine['missed']:.2%}",
            ]
        )
        results[str(rank)] = {
            "one": one,
            "seconds": {d: [r.seconds for r in runs[d]] for d in runs},
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    head = ["", "1 layer, s", f"{max(depths)} layers, s", "times ours", "misses of the update"]
    flat = ["rank", "layers", "runs, s", "median, s", "own memory above torch, MiB"]
    return f"{table(head, rows)}\n\n{table(flat, sizes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--depth", default="4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="only try the script")
    arguments = parser.parse_args()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    depths = [int(depth) for depth in arguments.depth.split(",")]
    place: AbstractContextManager[str | Path] = (
        nullcontext(arguments.dir) if arguments.dir else tempfile.TemporaryDirectory()
    )
    with place as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        check_space(Path(folder), [replace(llama.LLAMA_1B, layers=max(depths))])
        print(bench(Path(folder), depths, ranks, arguments))


if __name__ == "__main__":
    main()
