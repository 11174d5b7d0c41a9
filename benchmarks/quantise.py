"""Time `merge --quantize` for every scheme on a Llama-1B shape. See README.md here.

* `python benchmarks/quantise.py`: `cp -r` of the base, a dense merge, and each scheme.
* `--whole-model` adds what one does without this tool: PEFT merges in memory; for bitsandbytes it
  saves, transformers loads that in the scheme and saves; compressed-tensors quantises it there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import llama
import merge
from measure import Measured
from peft_quantise import LIBRARY

from dora_convert.core.protocols import Quantizer
from dora_convert.quant import quantizers


@dataclass(frozen=True, slots=True)
class Row:
    """One command: its runs, and one more that was looked at for its memory."""

    name: str
    runs: list[Measured]
    peak: int

    def cells(self, nbytes: int) -> list[str]:
        times = sorted(result.seconds for result in self.runs)
        middle = times[len(times) // 2]
        return [
            self.name,
            ", ".join(f"{t:.1f}" for t in times),
            f"{nbytes / middle / merge.MIB:.0f}",
            f"{self.peak / merge.MIB:.0f}",
        ]


def commands(case: merge.Case, schemes: list[str], *, library: bool) -> dict[str, merge.Command]:
    """By name, in the order of the table."""
    known = case.commands(peft=False)
    found = {merge.CP: known[merge.CP], "dense": known[merge.OURS]}
    for scheme in schemes:
        found[scheme] = [*known[merge.OURS], "--quantize", scheme]
        if library and scheme in LIBRARY:
            child = Path(__file__).with_name("peft_quantise.py")
            road = [sys.executable, child, scheme, case.base, case.adapter, case.out]
            found[f"{scheme}, PEFT and {LIBRARY[scheme]}"] = road
    return found


def measured(case: merge.Case, name: str, command: merge.Command, rounds: int) -> Row:
    runs = [merge.once(case, command) for _ in range(rounds)]
    return Row(name, runs, merge.once(case, command, sampled=True).own_peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where the data go; a temporary folder")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="only try the script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemes", help="some, with commas between")
    parser.add_argument("--whole-model", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        case = merge.Case(folder / "base", folder / "adapter", folder / "out" / "model")
        # Rows that every group size divides, also in the small one.
        tiny = replace(llama.TINY, hidden=128, intermediate=256, head_dim=32)
        # A small vocabulary: what is only copied says nothing about a scheme.
        large = replace(llama.LLAMA_1B, layers=options.layers, vocab=32000)
        shape = tiny if options.tiny else large
        llama.make(folder, shape)
        writable = [n for n in quantizers.names() if isinstance(quantizers.get(n), Quantizer)]
        writable.remove("mxfp4")  # of gpt-oss' experts alone
        schemes = options.schemes.split(",") if options.schemes else writable
        head = ["", "runs, s", "MiB of the base in a second", "own memory, MiB"]
        rows = []
        for label, command in commands(case, schemes, library=options.whole_model).items():
            row = measured(case, label, command, options.rounds)
            rows.append(row.cells(shape.nbytes()))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        print(merge.table(head, rows))


if __name__ == "__main__":
    main()
