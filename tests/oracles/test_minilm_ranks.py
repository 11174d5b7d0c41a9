"""A really trained adapter at ranks from 1 to full: never 0.2 % above the optimum of a full SVD."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_convert import api
from dora_convert.core.lora import RankChoice
from dora_convert.core.pictures import Curve

from .models import merged_by_formula

ADAPTER = Path(__file__).parents[2] / "fixtures" / "minilm"
RANKS = (1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 90, 128, 192, 256, 320, 383, 384)
FULL = 384
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def updates(minilm: Path) -> dict[str, Tensor]:
    """The formula of arXiv 2402.09353 in float64, by module path."""
    weights, parts = (
        load_file(minilm / "model.safetensors"),
        load_file(ADAPTER / "adapter_model.safetensors"),
    )
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    paths = [
        key.removeprefix(PREFIX).removesuffix(".lora_magnitude_vector")
        for key in parts
        if key.endswith(".lora_magnitude_vector")
    ]
    stored = {path: weights[f"{path}.weight"] for path in paths}
    found = {
        path: merged_by_formula(path, weight, parts, scaling=scaling) - weight.double()
        for path, weight in stored.items()
    }
    assert len(found) == 36
    return found


@pytest.fixture(scope="module")
def spectra(updates: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: torch.linalg.svdvals(update) for path, update in updates.items()}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [8, 64])
def test_near_the_weighted_optimum(
    rank: int, minilm: Path, updates: dict[str, Tensor], tmp_path: Path
) -> None:
    """The default: errors by the gain of the norm before a layer, which BERT has after others."""
    weights = load_file(minilm / "model.safetensors")
    best = total = 0.0
    for path, update in updates.items():
        _, _, layer, part = path.split(".", 3)
        norms = {
            "attention.self": f"encoder.layer.{int(layer) - 1}.output.LayerNorm.weight"
            if layer != "0"
            else "embeddings.LayerNorm.weight",
            "intermediate": f"encoder.layer.{layer}.attention.output.LayerNorm.weight",
        }
        for gain in (weights[name] for at, name in norms.items() if part.startswith(at)):
            spectrum = torch.linalg.svdvals(update * gain.double())
            best += float(spectrum[rank:].square().sum())
            total += float(spectrum.square().sum())
    report = api.to_lora(
        ADAPTER,
        tmp_path / "lora",
        base=minilm,
        how=api.LoraOptions(choice=RankChoice(rank=rank), stack="peft"),
    )
    assert report.weighted_residual is not None
    assert 1 - 1e-6 <= report.weighted_residual / math.sqrt(best / total) <= 1.002


@pytest.mark.slow
@pytest.mark.parametrize("rank", RANKS)
def test_near_the_optimum(
    rank: int,
    minilm: Path,
    updates: dict[str, Tensor],
    spectra: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    how = api.LoraOptions(choice=RankChoice(rank=rank), stack="peft", weight="plain")
    report = api.to_lora(ADAPTER, tmp_path / "lora", base=minilm, how=how)
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


@pytest.mark.slow
def test_the_spectrum_that_is_drawn(
    minilm: Path, updates: dict[str, Tensor], spectra: dict[str, Tensor], tmp_path: Path
) -> None:
    """Every rank up to 64 of one run, of all modules and of a group, near those of a full SVD."""
    how = api.PlotOptions(kind="spectrum", max_rank=64)
    report = api.plot(ADAPTER, tmp_path / "spectrum.svg", base=minilm, how=how)
    curves = {curve.group: curve for curve in report.shown if isinstance(curve, Curve)}
    for group in (None, "query", "intermediate.dense"):
        paths = [path for path in updates if group is None or path.endswith(f".{group}")]
        total = sum(float(updates[path].square().sum()) for path in paths)
        for rank, missed in enumerate(curves[group].missed, 1):
            least = sum(float(spectra[path][rank:].square().sum()) for path in paths)
            assert 1 - 1e-5 <= missed / math.sqrt(least / total) <= 1.002, (group, rank)
