"""gpt-oss in MXFP4: the dense result has its experts as a 16-bit checkpoint has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dora_convert import api

from .models import Trained, distance, load, outputs, quiet, tokens, train

EXPERTS = ("gate_up_proj", "down_proj")


def in_mxfp4(dense: Path, out: Path) -> dict[str, Tensor]:
    """A checkpoint whose experts are random codes; what transformers makes of them, by name."""
    shutil.copytree(dense, out)
    random = torch.Generator().manual_seed(2)
    stored = load_file(dense / "model.safetensors")
    expected = {}
    for name in [n for n in stored if n.endswith(EXPERTS)]:
        experts, inner, rows = stored.pop(name).shape
        shape = (experts, rows, inner // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=random).byte()
        scales = torch.randint(118, 123, shape, generator=random).byte()
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (out / "config.json").write_text(json.dumps(config))
    return expected


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(5)
    config = GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
        tie_word_embeddings=False,
    )
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    modules = ["q_proj", "v_proj", "o_proj"]
    return train(tmp_path_factory.mktemp("oss"), model, tokens(), target_modules=modules)


@pytest.mark.filterwarnings("ignore")
def test_the_same_format_again(case: Trained, tmp_path: Path) -> None:
    """The experts' bytes pass through, and transformers finds what it found in the base."""
    in_mxfp4(case.base, tmp_path / "base")
    how = api.MergeOptions(quantize="mxfp4", samples=None)
    report = api.merge(case.adapter, tmp_path / "out", base=tmp_path / "base", how=how)
    assert report.survival is None
    api.verify(tmp_path / "out", adapter=case.adapter, base=tmp_path / "base", samples=None)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    assert before.keys() == after.keys()
    for name in [n for n in before if "experts" in n]:
        assert torch.equal(before[name], after[name]), name
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        adapted = PeftModel.from_pretrained(base.float(), case.adapter).eval()
        unmerged = outputs(adapted, case.inputs)
    merged = load(tmp_path / "out", AutoModelForCausalLM).float()
    assert distance(outputs(merged, case.inputs), unmerged) < 0.02


@pytest.mark.filterwarnings("ignore")
def test_a_base_of_16_bits(case: Trained, tmp_path: Path) -> None:
    """As near to it as 4 bits are, and in the sense that transformers reads."""
    how = api.MergeOptions(quantize="mxfp4", samples=None)
    api.merge(case.adapter, tmp_path / "out", base=case.base, how=how)
    api.verify(tmp_path / "out", adapter=case.adapter, base=case.base, samples=None)
    dense, stored = (load_file(at / "model.safetensors") for at in (case.base, tmp_path / "out"))
    names = [name for name in dense if name.endswith(EXPERTS)]
    assert names
    for name in names:
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        decoded = convert_moe_packed_tensors(blocks, scales)
        assert (decoded - dense[name]).norm() < 0.14 * dense[name].norm()
    load(tmp_path / "out", AutoModelForCausalLM)


@pytest.mark.filterwarnings("ignore")
def test_a_dense_result(case: Trained, tmp_path: Path) -> None:
    expected = in_mxfp4(case.base, tmp_path / "base")
    how = api.MergeOptions(samples=None)
    api.merge(case.adapter, tmp_path / "out", base=tmp_path / "base", how=how)
    api.verify(tmp_path / "out", adapter=case.adapter, base=tmp_path / "base", samples=None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        adapted = PeftModel.from_pretrained(base.float(), case.adapter).eval()
        unmerged = outputs(adapted, case.inputs)
    merged = load(tmp_path / "out", AutoModelForCausalLM).float()
    assert distance(outputs(merged, case.inputs), unmerged) < 0.02  # rounded to bfloat16 once
