"""Block FP8 with the experts of a layer in one tensor, as transformers has them in memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from dora_convert import api

from .models import Trained, load, quiet, tokens, train

EXPERTS = [f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1)
           for leaf in ("gate_up_proj", "down_proj")]  # fmt: skip
CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
}


def tiny() -> Qwen3MoeForCausalLM:
    torch.manual_seed(5)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=96,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=3,
            num_experts_per_tok=2,
        )
    ).to(torch.bfloat16)


def in_fp8(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    quantise = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config()))
    out: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name in EXPERTS or name.endswith("_proj.weight"):
            out |= quantise.convert({name: tensor})
        else:
            out[name] = tensor
    return out


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A 16-bit base under the names that its modules have in memory."""
    folder = tmp_path_factory.mktemp("experts")
    model = tiny()
    with quiet():
        model.save_pretrained(folder / "base")
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(EXPERTS) <= stored.keys()
    assert stored[EXPERTS[0]].shape == (3, 256, 128)
    save_file(stored, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    modules = ["q_proj", "v_proj"]
    return train(folder, model, tokens(), base=folder / "base", target_modules=modules)


@pytest.fixture(scope="module")
def fp8(case: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    stored = in_fp8(load_file(case.base / "model.safetensors"))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((case.base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return folder


def test_read_as_transformers_does(case: Trained, fp8: Path, tmp_path: Path) -> None:
    api.merge(case.adapter, tmp_path / "out", base=fp8)
    api.verify(tmp_path / "out", adapter=case.adapter, base=fp8, samples=None)
    got = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(fp8 / "model.safetensors")
    dequantise = Fp8Dequantize(SimpleNamespace(quantization_config=FineGrainedFP8Config()))
    for name in EXPERTS:
        parts = {"weight": [stored[name]], "weight_scale_inv": [stored[f"{name}_scale_inv"]]}
        (want,) = dequantise.convert(parts).values()
        want = want[0] if isinstance(want, list) else want
        assert got[name].dtype is torch.bfloat16
        assert torch.equal(got[name], want.bfloat16()), name


def test_the_bytes_of_experts_pass_through(case: Trained, fp8: Path, tmp_path: Path) -> None:
    how = api.MergeOptions(quantize="fp8")
    api.merge(case.adapter, tmp_path / "out", base=fp8, how=how)
    got = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(fp8 / "model.safetensors")
    assert got.keys() == before.keys()
    changed = {
        name for name in got if not torch.equal(got[name].view(torch.uint8).flatten(),
                                                before[name].view(torch.uint8).flatten())
    }  # fmt: skip
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def test_others_stay_dense_and_the_config_says_so(case: Trained, tmp_path: Path) -> None:
    """Which axis is which is not known of them; transformers takes them for quantised else."""
    out = tmp_path / "out"
    api.merge(case.adapter, out, base=case.base, how=api.MergeOptions(quantize="fp8"))
    words = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {f"model.layers.{i}.mlp.experts" for i in (0, 1)} < set(words["modules_to_not_convert"])
    got = load(out, AutoModelForCausalLM).state_dict()
    want = load_file(case.base / "model.safetensors")
    for name in EXPERTS:
        assert torch.equal(got[name].to(torch.bfloat16), want[name]), name
