"""A Megatron state dict, written from the definition of its layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dora_convert import api

CASE = Path(__file__).parents[2] / "fixtures" / "megatron"


def test_fused_layers_are_taken_apart(tmp_path: Path) -> None:
    api.merge(CASE / "adapter", tmp_path / "out", base=CASE / "base")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(CASE / "base" / "model.safetensors")
    expected = load_file(CASE / "expected.safetensors")
    assert len(expected) == 20
    assert sum(key.endswith(".bias") for key in expected) == 6
    for key, tensor in expected.items():
        assert (merged[key].double() - tensor).norm() <= 1e-6 * tensor.norm(), key
        assert (base[key].double() - tensor).norm() > 0.01 * tensor.norm(), key
    for key in base.keys() - expected.keys():
        assert merged[key].equal(base[key]), key


def test_rows_of_two_processes(tmp_path: Path) -> None:
    """Gathered from two processes: each has its part of the gate, then its part of the other."""
    held = load_file(CASE / "adapter" / "adapter_model.safetensors")
    column_parallel = {k: t for k, t in held.items() if "linear_qkv" in k or "linear_fc1" in k}
    for key, tensor in column_parallel.items():
        if "linear_fc1" in key and not key.endswith("linear_in.weight"):
            quarters = tensor.chunk(4)  # gate 0, gate 1, other 0, other 1
            column_parallel[key] = torch.cat([quarters[i] for i in (0, 2, 1, 3)])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(column_parallel, adapter / "adapter_model.safetensors")
    shutil.copy(CASE / "adapter" / "config.json", adapter)
    recipe = json.loads((CASE / "adapter" / "adapter_config.json").read_text())
    recipe["tensor_model_parallel_size"] = 2
    (adapter / "adapter_config.json").write_text(json.dumps(recipe))
    api.merge(adapter, tmp_path / "out", base=CASE / "base")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(CASE / "expected.safetensors")
    compared = [key for key in expected if "o_proj" not in key and "down_proj" not in key]
    assert len(compared) == 16
    for key in compared:
        assert (merged[key].double() - expected[key]).norm() <= 1e-6 * expected[key].norm(), key
