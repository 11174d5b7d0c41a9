"""Merge one checkpoint the ways of others, each a process of its own, against `cp` and ours.

`python benchmarks/peers.py [--layers 4]`. Needs `pip install mergekit "mlx-lm" "mlx[cpu]"`; a peer
that is not installed is left out and named.

* `reader`: mergekit's lazy loader takes every tensor once and drops it; the reading alone.
* `layer`: the way of axolotl's merge, in words of our own: whole shards; for every matrix a new
  PEFT layer is filled, merged, the base subtracted, and the difference added to the base.
* `fuse`: mlx-lm's DoRA layer fuses every matrix; shards are loaded lazily and saved whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import llama
from measure import Measured
from merge import CP, CP_SYNC, OURS, Case, Command, check_space, once, say, table

SCALING = llama.ALPHA / llama.RANK
WEIGHT = ".weight"


def reader(base: Path, adapter: Path, out: Path) -> None:
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader  # noqa: PLC0415

    loader = LazyTensorLoader.from_disk(str(base))
    for name in sorted(loader.index.tensor_paths):
        # One pass over the bytes, which are mapped, brings them in.
        loader.get_tensor(name).view(-1).max()


def layer(base: Path, adapter: Path, out: Path) -> None:
    import torch  # noqa: PLC0415
    from peft import LoraConfig  # noqa: PLC0415
    from peft.tuners.lora.layer import Linear  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    parts = load_file(adapter / "adapter_model.safetensors")

    def merged(weight: torch.Tensor, key: str) -> torch.Tensor:
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        plain.weight.data = weight.clone()
        config = LoraConfig(r=llama.RANK, lora_alpha=llama.ALPHA, use_dora=True)
        made = Linear(plain, "default", config, r=config.r, lora_alpha=config.lora_alpha)
        made.lora_A["default"].weight.data = parts[f"{key}.lora_A.weight"]
        made.lora_B["default"].weight.data = parts[f"{key}.lora_B.weight"]
        magnitude = made.lora_magnitude_vector["default"]
        magnitude.weight.data = parts[f"{key}.lora_magnitude_vector"]
        made.merge()
        return weight + (made.get_base_layer().weight.data - weight)

    with torch.no_grad():
        for shard in shards(base):
            tensors = load_file(shard)
            for name, weight in tensors.items():
                if key := adapted(name, parts):
                    tensors[name] = merged(weight, key)
            save_file(tensors, out / shard.name, metadata={"format": "pt"})


def fuse(base: Path, adapter: Path, out: Path) -> None:
    import mlx.core as mx  # noqa: PLC0415
    from mlx import nn  # noqa: PLC0415
    from mlx_lm.tuner.dora import DoRALinear  # noqa: PLC0415

    parts = mx.load(str(adapter / "adapter_model.safetensors"))
    for shard in shards(base):
        tensors = mx.load(str(shard))
        for name, weight in tensors.items():
            if key := adapted(name, parts):
                plain = nn.Linear(1, 1, bias=False)
                plain.weight = weight
                made = DoRALinear.from_base(plain, r=llama.RANK, scale=SCALING)
                made.lora_a = parts[f"{key}.lora_A.weight"].T
                made.lora_b = parts[f"{key}.lora_B.weight"].T
                made.m = parts[f"{key}.lora_magnitude_vector"]
                # It would be float32, twice the bytes of what the others write.
                tensors[name] = made.fuse().weight.astype(weight.dtype)
        mx.save_safetensors(str(out / shard.name), tensors)


PEERS: dict[str, tuple[str, str, Callable[[Path, Path, Path], None]]] = {
    "reader": ("mergekit's reader", "mergekit", reader),
    "layer": ("a PEFT layer a matrix, as axolotl", "peft", layer),
    "fuse": ("mlx-lm's fuse, on the CPU", "mlx", fuse),
}


def shards(base: Path) -> Iterator[Path]:
    yield from sorted(base.glob("*.safetensors"))


def adapted(name: str, parts: dict[str, Any]) -> str | None:
    key = f"base_model.model.{name.removesuffix(WEIGHT)}"
    return key if f"{key}.lora_magnitude_vector" in parts else None


def measure(case: Case, rounds: int) -> dict[str, list[Measured]]:
    """Alternating runs of all that is installed."""
    commands: dict[str, Command] = case.commands(peft=False)
    for way, (label, package, _) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            say(f"{label}: left out, {package} is not installed")
            continue
        commands[label] = [sys.executable, __file__, way, case.base, case.adapter, case.out]
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    once(case, commands[CP])  # not counted
    for number in range(1, rounds + 1):
        for name, command in commands.items():
            runs[name].append(once(case, command))
            say(f"round {number}: {name} {runs[name][-1].seconds:.2f} s")
    return runs


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] in PEERS:
        out = Path(sys.argv[4])
        out.mkdir(parents=True, exist_ok=True)
        PEERS[sys.argv[1]][2](Path(sys.argv[2]), Path(sys.argv[3]), out)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the data goes, and stays")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="only try the script")
    options = parser.parse_args()
    shape = replace(llama.TINY if options.tiny else llama.LLAMA_1B, layers=options.layers)
    place: AbstractContextManager[str | Path] = (
        nullcontext(options.dir) if options.dir else tempfile.TemporaryDirectory()
    )
    with place as folder:
        home = Path(folder) / f"llama-{shape.layers}-{shape.hidden}"
        home.mkdir(parents=True, exist_ok=True)
        check_space(home, shape)
        base, adapter = llama.make(home, shape)
        runs = measure(Case(base, adapter, home / "outputs" / "merged"), options.rounds)
    seconds = {name: [found.seconds for found in each] for name, each in runs.items()}
    if options.json:
        options.json.write_text(json.dumps({"bytes": shape.nbytes(), "seconds": seconds}, indent=2))
    ours = median(seconds[OURS])
    rows = [
        [
            name,
            ", ".join(f"{s:.1f}" for s in each),
            f"{median(each):.1f}",
            f"{median(each) / ours:.2f}",
            f"{shape.nbytes() / median(each) / 1e6:.0f}",
        ]
        for name, each in seconds.items()
    ]
    say(f"{CP} returns before the copy is on the disk; {CP_SYNC} and {OURS} after")
    print(f"{shape.layers} layers, {shape.nbytes() / 1e9:.2f} GB of bf16\n")
    print(table(["", "runs, s", "median, s", "times ours", "MB/s"], rows))


if __name__ == "__main__":
    main()
