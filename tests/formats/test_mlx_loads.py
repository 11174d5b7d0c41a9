"""What is written for mlx-lm, in mlx-lm itself."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from dora_convert import api

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

FIXTURES = Path(__file__).parents[2] / "fixtures"
TOKENS = [[1, 5, 2, 33, 7, 7, 19, 30]]


def logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    with warnings.catch_warnings(), mx.stream(mx.cpu):
        warnings.simplefilter("ignore")
        model, _ = load_model(base)
        if adapter is not None:
            model = load_adapters(model, str(adapter))
            model.eval()
        return np.array(model(mx.array(TOKENS)).astype(mx.float32)).astype(np.float64)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("case", ["linear", "embedding"])
def test_its_own_adapters_as_they_were(case: str, tmp_path: Path) -> None:
    """The config names modules by their full paths, and mlx-lm computes the same to the bit."""
    mlx = FIXTURES / "mlx"
    how = api.ConvertOptions(format="mlx")
    api.convert(mlx / case, tmp_path / "out", how=how)
    goal = logits(mlx / "base", mlx / case)
    assert distance(logits(mlx / "base"), goal) > 0.01
    assert np.array_equal(logits(mlx / "base", tmp_path / "out"), goal)


@pytest.mark.parametrize("case", ["llama_qv", "llama_all_sharded"])
def test_adapters_of_peft(case: str, tmp_path: Path) -> None:
    """mlx-lm with the converted adapter computes as mlx-lm does with PEFT's own merge."""
    folder = FIXTURES / "peft" / case
    how = api.ConvertOptions(format="mlx")
    api.convert(folder / "adapter", tmp_path / "adapter", how=how)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "model.safetensors").write_bytes((folder / "expected.safetensors").read_bytes())
    (merged / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    goal = logits(merged)
    assert distance(logits(folder / "base"), goal) > 0.01
    assert distance(logits(folder / "base", tmp_path / "adapter"), goal) < 1e-5
