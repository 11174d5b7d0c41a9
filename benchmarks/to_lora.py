"""Time `to-lora` on a Llama-1B-shaped adapter against PEFT and full decompositions.

`python benchmarks/to_lora.py`: ranks 16 and 64; see README.md here. The others take minutes for one
layer and are run on a model of one layer; dora-convert is run on that too, and on all layers.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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


def timed(command: Command) -> tuple[Measured, float]:
    """One run, and the seconds of CPU that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = run(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@dataclass(frozen=True)
class Deep:
    """All rounds of one command on the whole model."""

    seconds: list[float]
    cpu: list[float]
    own_peak: int


def repeated(base: Path, adapter: Path, rank: int, out: Path, rounds: int) -> Deep:
    runs = [timed(ours(base, adapter, rank, out)) for _ in range(rounds)]
    sampled = run(ours(base, adapter, rank, out), sampled=True)
    return Deep([found.seconds for found, _ in runs], [cpu for _, cpu in runs], sampled.own_peak)


def compare(folder: Path, shape: llama.Shape, rank: int) -> dict[str, Any]:
    """One layer: seconds and what is missed, of PEFT, of full decompositions, and of ours."""
    one = replace(shape, layers=1)
    base, adapter = llama.make(folder / "one", one)
    out = folder / "lora-one"
    mine, cpu = timed(ours(base, adapter, rank, out))
    child = Path(__file__).with_name("peft_to_lora.py")
    others = run([sys.executable, child, base, adapter, str(rank), out])
    found: dict[str, Any] = json.loads(others.stdout)
    found["ours"] |= {"seconds": mine.seconds, "cpu": cpu}
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
        runs: dict[int, Deep] = {}
        for depth in depths:
            base, adapter = llama.make(folder / str(depth), replace(shape, layers=depth))
            out = folder / "lora"
            runs[depth] = deep = repeated(base, adapter, rank, out, arguments.rounds)
            above = f"{(deep.own_peak - floor) / MIB:.0f}"
            each = ", ".join(f"{seconds:.1f}" for seconds in deep.seconds)
            middle = f"{median(deep.seconds):.1f}"
            sizes.append([f"{rank}", f"{depth}", each, middle, f"{median(deep.cpu):.1f}", above])
            say(f"rank {rank}, {depth} layers: {each} s, {above} MiB")
        rows += compared(rank, one, max(depths), runs[max(depths)])
        results[str(rank)] = {"one": one, "runs": {d: vars(deep) for d, deep in runs.items()}}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    deepest = f"{max(depths)} layers"
    head = ["", "1 layer, s", f"{deepest}, s", "times ours", f"{deepest}, CPU s", "times ours"]
    flat = ["rank", "layers", "runs, s", "median, s", "CPU, s", "own memory above torch, MiB"]
    return f"{table([*head, 'misses of the update'], rows)}\n\n{table(flat, sizes)}"


def compared(rank: int, one: dict[str, Any], depth: int, deep: Deep) -> list[list[str]]:
    """The rows of one rank; the others' single layer is multiplied by the depth."""
    seconds, cpu = median(deep.seconds), median(deep.cpu)
    rows = []
    for name, label in (("peft", "PEFT convert_to_lora"), ("svd", "full SVD")):
        whole, whole_cpu = one[name]["seconds"] * depth, one[name]["cpu"] * depth
        times = [f"{whole:.0f}", f"{whole / seconds:.0f}"]
        times += [f"{whole_cpu:.0f}", f"{whole_cpu / cpu:.0f}"]
        rows.append([f"{label}, rank {rank}", f"{one[name]['seconds']:.1f}", *times])
    ours = [f"{one['ours']['seconds']:.1f}", f"{seconds:.1f}", "1", f"{cpu:.1f}", "1"]
    rows.append([f"dora-convert, rank {rank}", *ours])
    for row, name in zip(rows, ("peft", "svd", "ours"), strict=True):
        row.append(f"{one[name]['missed']:.2%}")
    return rows


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
        check_space(Path(folder), replace(llama.LLAMA_1B, layers=max(depths)))
        print(bench(Path(folder), depths, ranks, arguments))


if __name__ == "__main__":
    main()
