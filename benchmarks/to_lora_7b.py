"""Time `to-lora` on the 224 modules of a 7B-shaped adapter against PEFT's full SVD.

`python benchmarks/to_lora_7b.py`: 32 layers of Llama-2-7B's shape, rank 32, 13.5 GB of disk.
`--layers N` runs fewer and multiplies the whole process, its start included, by 32 / N, which the
result says. PEFT and full decompositions are run on one layer, which has a module of each shape,
and multiplied by the layers; what they need to start is not in their figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import llama
from measure import run
from merge import TORCH_ONLY, check_space, machine, say, table
from to_lora import MIB, ours, timed

LAYERS = 32
LLAMA_7B = llama.Shape(
    layers=LAYERS,
    hidden=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocab=32000,
)


def bench(folder: Path, shape: llama.Shape, rank: int) -> str:
    """The table: seconds, those of CPU and what is missed, for all layers; and how it came."""
    one = replace(shape, layers=1)
    base, adapter = llama.make(folder / f"7b-1-{shape.hidden}", one)
    out = folder / "lora"
    single, single_cpu = timed(ours(base, adapter, rank, out))
    child = Path(__file__).with_name("peft_to_lora.py")
    others = json.loads(run([sys.executable, child, base, adapter, str(rank), out]).stdout)
    say(f"one layer: ours {single.seconds:.1f} s, others {json.dumps(others)}")

    base, adapter = llama.make(folder / f"7b-{shape.layers}-{shape.hidden}", shape)
    whole, whole_cpu = timed(ours(base, adapter, rank, out))
    floor = run(TORCH_ONLY, sampled=True).own_peak
    above = (run(ours(base, adapter, rank, out), sampled=True).own_peak - floor) / MIB

    factor = LAYERS / shape.layers
    seconds, cpu = whole.seconds * factor, whole_cpu * factor
    rows = [["dora-convert", f"{single.seconds:.1f}", f"{seconds:.0f}", "1", f"{cpu:.0f}", "1"]]
    rows[0].append(f"{others['ours']['missed']:.2%}")
    for key, label in (("peft", "PEFT convert_to_lora"), ("svd", "full SVD")):
        found = others[key]
        all_seconds, all_cpu = found["seconds"] * LAYERS, found["cpu"] * LAYERS
        row = [
            label,
            f"{found['seconds']:.1f}",
            f"{all_seconds:.0f}",
            f"{all_seconds / seconds:.0f}",
        ]
        rows.append([*row, f"{all_cpu:.0f}", f"{all_cpu / cpu:.0f}", f"{found['missed']:.2%}"])
    head = ["", "1 layer, s", f"{LAYERS} layers, s", "times ours", "CPU s", "times ours", "misses"]
    how = (
        f"rank {rank}, {7 * LAYERS} modules. dora-convert: {shape.layers} layers took "
        f"{whole.seconds:.1f} s and {whole_cpu:.1f} CPU seconds, times {factor:g}; one layer took "
        f"{single_cpu:.1f} CPU seconds; {above:.0f} MiB above importing torch. "
        f"The others: one layer, times {LAYERS}."
    )
    return f"{table(head, rows)}\n\n{how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers that are run (32)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dir", type=Path, help="where the data goes, and stays")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, to try this script")
    options = parser.parse_args()
    shape = replace(llama.TINY if options.tiny else LLAMA_7B, layers=options.layers)
    place: AbstractContextManager[str | Path] = (
        nullcontext(options.dir) if options.dir else tempfile.TemporaryDirectory()
    )
    with place as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        check_space(Path(folder), replace(shape, layers=shape.layers // 2 + 1))
        about = machine(Path(folder))
        print("; ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
        print(bench(Path(folder), shape, options.rank))


if __name__ == "__main__":
    main()
