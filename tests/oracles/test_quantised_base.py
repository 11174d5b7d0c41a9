"""Adapters on quantised bases: dense results, against transformers' decoding and the formula."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dora_convert import api
from dora_convert.core.lora import RankChoice
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError

from .models import Trained, merged_by_formula, outputs, quiet, tokens, train

TILE = 128


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=TILE,
        intermediate_size=2 * TILE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def block_fp8(dense: Path, out: Path) -> Path:
    """A checkpoint in DeepSeek's block FP8, by its definition: codes times their tile's scale."""
    shutil.copytree(dense, out)
    stored = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        tiles = tensor.float().view(rows // TILE, TILE, columns // TILE, TILE)
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).view(rows, columns)
        stored[name] = codes.to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [TILE, TILE],
        "modules_to_not_convert": ["lm_head"],
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def decoded(name: str, stored: dict[str, Tensor]) -> Tensor:
    codes, scale = stored[name].double(), stored[f"{name}_scale_inv"].double()
    spread = scale.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    return codes * spread


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The adapter is trained on the quantised base, as transformers decodes it."""
    folder = tmp_path_factory.mktemp("fp8")
    with quiet():
        tiny().save_pretrained(folder / "dense")
        base = block_fp8(folder / "dense", folder / "base")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16
        model.config.__dict__.pop("quantization_config", None)
        model.is_quantized = False
        modules = ["q_proj", "v_proj", "down_proj"]
        return train(folder, model, tokens(), base=base, target_modules=modules)


def test_merge_is_dense_and_exact(case: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = api.merge(case.adapter, out, base=case.base, how=api.MergeOptions(dtype=DType.F32))
    assert any("fp8" in note for note in report.notes)
    api.verify(out, adapter=case.adapter, base=case.base, samples=None)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    stored, got = load_file(case.base / "model.safetensors"), load_file(out / "model.safetensors")
    adapter = load_file(case.adapter / "adapter_model.safetensors")
    assert got.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    for name in (n for n in got if n.endswith("_proj.weight")):
        path = name.removesuffix(".weight")
        expected = merged_by_formula(path, decoded(name, stored), adapter, scaling=2.0)
        assert (got[name].double() - expected).abs().max() < 2e-7


def test_transformers_computes_the_same(case: Trained, tmp_path: Path) -> None:
    api.merge(case.adapter, tmp_path / "out", base=case.base)
    with quiet():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval()
        model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.bfloat16).float()
        unmerged = outputs(PeftModel.from_pretrained(model, case.adapter).eval(), case.inputs)
    # The merged weights are rounded to bfloat16 once.
    got = outputs(merged, case.inputs)
    assert (got - unmerged).norm() < 0.02 * unmerged.norm()


def test_to_lora_over_a_quantised_base(case: Trained, tmp_path: Path) -> None:
    """At full rank the LoRA on the quantised base is the DoRA on it."""
    how = api.LoraOptions(choice=RankChoice(rank=TILE), stack="peft")
    report = api.to_lora(case.adapter, tmp_path / "lora", base=case.base, how=how)
    assert report.residual < 1e-3
    with quiet():
        results = []
        for adapter in (case.adapter, tmp_path / "lora"):
            model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.bfloat16).float()
            results.append(outputs(PeftModel.from_pretrained(model, adapter).eval(), case.inputs))
    assert (results[0] - results[1]).norm() < 1e-3 * results[0].norm()


def test_the_same_bytes_whatever_the_workers(case: Trained, tmp_path: Path) -> None:
    for workers in (1, 3):
        how = api.MergeOptions(workers=workers)
        api.merge(case.adapter, tmp_path / str(workers), base=case.base, how=how)
    one, three = (tmp_path / n / "model.safetensors" for n in "13")
    assert one.read_bytes() == three.read_bytes()


def test_an_unknown_quantisation(case: Trained, tmp_path: Path) -> None:
    base = shutil.copytree(case.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "surprise"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="surprise"):
        api.merge(case.adapter, tmp_path / "out", base=base)


def test_a_missing_scale(case: Trained, tmp_path: Path) -> None:
    base = shutil.copytree(case.base, tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(stored, base / "model.safetensors")
    with pytest.raises(InputError) as caught:
        api.merge(case.adapter, tmp_path / "out", base=base)
    assert any("up_proj.weight: weight_scale_inv is missing" in p for p in caught.value.problems)
