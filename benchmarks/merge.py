"""Time a merge of a Llama-1B-shaped checkpoint against `cp` and PEFT. See README.md here.

* `python benchmarks/merge.py`: one size; cp, PEFT and dora-convert.
* `python benchmarks/merge.py --depth 4,16,64 --skip-peft 64`: several sizes; is memory flat, and
  does time grow as the bytes do?

It takes twice the bytes of the largest size on the disk: one base, and one output at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import llama
import torch
from measure import Measured, run

MIB = 1 << 20
SETTLE = 4  # seconds
PHASES = ("plan", "merge", "sync", "verify")
TORCH_ONLY = [sys.executable, "-c", "import time, torch; time.sleep(0.3)"]
CP, CP_SYNC, PEFT, OURS = "cp -r", "cp -r, then sync", "PEFT", "dora-convert"

Command = list[str | Path]
Runs = dict[str, list[Measured]]


@dataclass(frozen=True, slots=True)
class Case:
    """The inputs of one size, and the output, in a folder that holds nothing else."""

    base: Path
    adapter: Path
    out: Path

    def commands(self, *, peft: bool) -> dict[str, Command]:
        """What is compared, in the order of one round."""
        merge: Command = [sys.executable, "-m", "dora_convert", "merge", self.adapter]
        child = Path(__file__).with_name("peft_merge.py")
        synced = 'cp -r "$1" "$2" && sync -f "$2"'
        commands: dict[str, Command] = {
            CP: ["cp", "-r", self.base, self.out],
            CP_SYNC: ["sh", "-c", synced, "sh", self.base, self.out],
            PEFT: [sys.executable, child, self.base, self.adapter, self.out],
            OURS: [*merge, "-b", self.base, "-o", self.out, "--json"],
        }
        if not peft:
            del commands[PEFT]
        return commands


def measure(case: Case, commands: Mapping[str, Command], rounds: int) -> Runs:
    """Alternate between the commands, so that a slow minute of the machine hits all of them."""
    runs: Runs = {name: [] for name in commands}
    once(case, commands[CP])  # not counted: the first to fill so many pages and blocks is slower
    for number in range(1, rounds + 1):
        for name, command in commands.items():
            result = once(case, command)
            runs[name].append(result)
            say(f"round {number}: {name} {result.seconds:.2f} s")
    for name, command in commands.items():
        peak = once(case, command, sampled=True).own_peak
        runs[name][0] = replace(runs[name][0], own_peak=peak)
    return runs


def once(case: Case, command: Command, *, sampled: bool = False) -> Measured:
    """Run it; its output goes at once, since the disk may not hold two."""
    outputs = case.out.parent
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    prepare(case)
    try:
        return run(command, sampled=sampled)
    finally:
        shutil.rmtree(outputs)


def prepare(case: Case) -> None:
    """No dirty pages of an earlier run, and the inputs in the page cache.

    Then a pause: a virtual machine hands freed memory back to its host within two seconds, and
    taking it again costs more than the copy. Without the pause a command that starts at once
    would be spared what one that first imports torch has to pay.
    """
    os.sync()
    read = 0
    for folder in (case.base, case.adapter):
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while part := len(file.read(16 * MIB)):
                    read += part
    if read > 16 * MIB:  # one that only tries the script has nothing to hand back
        time.sleep(SETTLE)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def seconds(runs: Iterable[Measured]) -> list[float]:
    return [result.seconds for result in runs]


def phases(result: Measured) -> dict[str, float]:
    """The phases that `dora-convert merge --json` reports."""
    reported: dict[str, float] = json.loads(result.stdout)["seconds"]
    return reported


def own_peak(runs: Iterable[Measured]) -> int:
    return max(result.own_peak for result in runs)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison(runs: Runs, torch_only: int) -> str:
    """Return the table of one size: every run, medians, ratios, memory."""
    head = ["", "runs, s", "median, s", "of cp", "of PEFT", "own memory, MiB", "above torch, MiB"]
    middle = {name: median(seconds(results)) for name, results in runs.items()}
    rows = []
    for name, results in runs.items():
        above = own_peak(results) - torch_only
        rows.append(
            [
                name,
                ", ".join(f"{s:.2f}" for s in seconds(results)),
                f"{middle[name]:.2f}",
                f"{middle[name] / middle[CP]:.2f}",
                f"{middle[name] / middle[PEFT]:.3f}" if PEFT in middle else "",
                f"{own_peak(results) / MIB:.0f}",
                "" if name.startswith("cp") else f"{above / MIB:.0f}",
            ]
        )
    ours = [
        [f"run {number}", f"{result.seconds:.2f}"]
        + [f"{phases(result).get(phase, 0.0):.2f}" for phase in PHASES]
        for number, result in enumerate(runs[OURS], 1)
    ]
    merge = median(phases(result).get("merge", 0.0) for result in runs[OURS])
    ratio = f"The merge phase alone takes {merge / middle[CP]:.2f} of cp (medians)."
    by_phase = table(["dora-convert, s", "wall", *PHASES], ours)
    return "\n\n".join((table(head, rows), by_phase, ratio))


def depths(by_layers: Mapping[int, Runs], sizes: Mapping[int, int], torch_only: int) -> str:
    """Return the table of several sizes."""
    head = ["layers", "GB", "median, s", "merge phase, s", "cp, s", "merge phase of cp"]
    head += ["PEFT, s", "of PEFT", "own memory, MiB", "above torch, MiB"]
    rows = []
    for layers, runs in by_layers.items():
        ours, copy = median(seconds(runs[OURS])), median(seconds(runs[CP]))
        merge = median(phases(result).get("merge", 0.0) for result in runs[OURS])
        peft = median(seconds(runs[PEFT])) if PEFT in runs else None
        peak = own_peak(runs[OURS])
        rows.append(
            [
                str(layers),
                f"{sizes[layers] / 1e9:.2f}",
                f"{ours:.2f}",
                f"{merge:.2f}",
                f"{copy:.2f}",
                f"{merge / copy:.2f}",
                "" if peft is None else f"{peft:.2f}",
                "" if peft is None else f"{ours / peft:.3f}",
                f"{peak / MIB:.0f}",
                f"{(peak - torch_only) / MIB:.0f}",
            ]
        )
    return table(head, rows)


def machine(folder: Path) -> dict[str, Any]:
    """What the numbers depend on."""

    def first_line(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return next(iter(done.stdout.splitlines()), "")

    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 30),
        "filesystem": first_line("stat", "-f", "-c", "%T", folder),
        "kernel": platform.release(),
        "cp": first_line("cp", "--version"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "page_cache": "warm: inputs are read before every run; no dirty pages",
    }


def check_space(home: Path, shape: llama.Shape) -> None:
    """A base, if `home` lacks it, and one output; a twentieth for what goes with them."""
    there = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    needed = 2.05 * shape.nbytes() - there
    free = shutil.disk_usage(home).free
    if free < needed:
        sys.exit(f"{home} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB more are needed")


def bench(
    folder: Path, shapes: Mapping[int, llama.Shape], options: argparse.Namespace
) -> dict[int, Runs]:
    """One size after the other; the data of each is deleted unless kept, also if it fails."""
    results = {}
    without_peft = () if options.skip_peft is None else options.skip_peft or shapes
    for layers, shape in shapes.items():
        home = folder / f"llama-{layers}-{shape.hidden}"
        home.mkdir(exist_ok=True)
        check_space(home, shape)
        try:
            say(f"data: {layers} layers, {shape.nbytes() / 1e9:.2f} GB")
            base, adapter = llama.make(home, shape)
            case = Case(base, adapter, home / "outputs" / "merged")
            commands = case.commands(peft=layers not in without_peft)
            results[layers] = measure(case, commands, options.rounds)
        finally:
            if not options.keep:
                shutil.rmtree(home)
    return results


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, default=16, help="depth of the model (16)")
    size.add_argument(
        "--depth",
        type=numbers,
        metavar="N,N",
        help="several depths: shows how time and memory depend on size",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command (3)")
    parser.add_argument(
        "--skip-peft",
        type=numbers,
        nargs="?",
        const=[],
        metavar="N,N",
        help="leave PEFT out at these depths, or at all: where it has no memory",
    )
    parser.add_argument("--dir", type=Path, help="where the data goes (a new temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep the data, to be used again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, to try this script")
    options = parser.parse_args(arguments)
    if options.keep and not options.dir:
        parser.error("--keep needs --dir")
    return options


def data_folder(chosen: Path | None) -> AbstractContextManager[str | Path]:
    if chosen is None:
        return tempfile.TemporaryDirectory(prefix="dora-convert-bench-")
    chosen.mkdir(parents=True, exist_ok=True)
    return nullcontext(chosen)


def as_json(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    def one(name: str, result: Measured) -> dict[str, Any]:
        numbers: dict[str, Any] = {"seconds": result.seconds, "own_peak_bytes": result.own_peak}
        return {**numbers, "phases": phases(result)} if name == OURS else numbers

    return {name: [one(name, result) for result in results] for name, results in runs.items()}


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    shape = llama.TINY if options.tiny else llama.LLAMA_1B
    shapes = {n: replace(shape, layers=n) for n in options.depth or [options.layers]}
    run(TORCH_ONLY)  # torch itself into the page cache
    torch_only = own_peak(run(TORCH_ONLY, sampled=True) for _ in range(3))
    with data_folder(options.dir) as folder:
        about = machine(Path(folder))
        results = bench(Path(folder), shapes, options)

    sizes = {layers: shape.nbytes() for layers, shape in shapes.items()}
    print("; ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print(f"A process that only imports torch: {torch_only / MIB:.0f} MiB of its own.\n")
    if options.depth:
        print(depths(results, sizes, torch_only))
    else:
        print(f"{options.layers} layers, {sizes[options.layers] / 1e9:.2f} GB of bf16\n")
        print(comparison(results[options.layers], torch_only))
    if options.json:
        report = {
            "machine": about,
            "torch_only_bytes": torch_only,
            "cases": [
                {"shape": asdict(shapes[layers]), "bytes": sizes[layers], "runs": as_json(runs)}
                for layers, runs in results.items()
            ],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
