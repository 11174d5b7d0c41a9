"""Memory of merging one tensor that is larger than all else: an embedding, norms over its rows.

`python benchmarks/embedding.py [--rows 128256 --columns 8192]`: 2.1 GB of bf16 by default, twice
that of disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from llama import RANK, TINY, write_header, write_tensor
from measure import run
from merge import MIB, TORCH_ONLY, say, table
from safetensors.torch import save_file

NAME = "model.embed_tokens"


def make(folder: Path, rows: int, columns: int) -> tuple[Path, Path]:
    """A base of this one tensor, and a DoRA of it in PEFT's layout."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    shard = {f"{NAME}.weight": (rows, columns)}
    with (base / "model.safetensors").open("wb") as file:
        write_header(file, shard)
        write_tensor(file, (rows, columns), torch.Generator().manual_seed(0))
    (base / "config.json").write_text(json.dumps(TINY.config()))
    generator = torch.Generator().manual_seed(1)
    key = f"base_model.model.{NAME}."
    tensors = {
        key + "lora_embedding_A": torch.randn(RANK, rows, generator=generator) * 0.005,
        key + "lora_embedding_B": torch.randn(columns, RANK, generator=generator) * 0.01,
        key + "lora_magnitude_vector": 0.02 * rows**0.5 * torch.ones(columns),
    }
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "use_dora": True, "r": RANK, "lora_alpha": 2 * RANK}
    config["target_modules"] = ["embed_tokens"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128256)
    parser.add_argument("--columns", type=int, default=8192)
    options = parser.parse_args()
    torch_only = max(run(TORCH_ONLY, sampled=True).own_peak for _ in range(3))
    rows = []
    with tempfile.TemporaryDirectory(prefix="dora-convert-bench-") as place:
        for part in (4, 1):
            folder = Path(place, str(part))
            folder.mkdir()
            count = options.rows // part
            say(f"{count} x {options.columns}")
            base, adapter = make(folder, count, options.columns)
            command = [sys.executable, "-m", "dora_convert", "merge", adapter, "-b", base]
            found = run([*command, "-o", folder / "out", "--json"], sampled=True)
            report = json.loads(found.stdout)
            above = (found.own_peak - torch_only) / MIB
            rows.append(
                [
                    f"{count} x {options.columns}",
                    f"{report['nbytes'] / 1e9:.2f}",
                    f"{report['seconds']['merge']:.1f}",
                    f"{found.own_peak / MIB:.0f}",
                    f"{above:.0f}",
                ]
            )
    print(table(["embedding", "GB", "merge, s", "own memory, MiB", "above torch, MiB"], rows))


if __name__ == "__main__":
    main()
