"""`--residual-rank`: PEFT loads the LoRA on the quantised checkpoint, which comes nearer by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dora_convert import api

from .models import FIXTURES, Trained, outputs, quiet, tokens, train

RANK = 16
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]


def small(model: PeftModel) -> None:
    """An update of some percent, which a 4-bit grid swallows."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(0.05)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("dense")
    return train(folder, model, tokens(), target_modules=MODULES, change=small)


def on_grid(case: Trained, folder: Path, scheme: str) -> Path:
    """The base stored in the scheme."""
    still = api.ReadOptions(scale=0.0, include=["*.nothing", "*.0.self_attn.q_proj"])
    how = api.MergeOptions(quantize=scheme, samples=0)
    api.merge(case.adapter, folder / "grid", base=case.base, options=still, how=how)
    return folder / "grid"


# In 8 bits the activations' own rounding is most of what is left.
@pytest.mark.parametrize(
    ("scheme", "most"), [("nf4", 0.9), ("w4a16", 0.9), ("w8a8", 1.0), ("fp8_dynamic", 1.0)]
)
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it_on_the_quantised_model(
    scheme: str, most: float, case: Trained, tmp_path: Path
) -> None:
    base = on_grid(case, tmp_path, scheme)
    api.merge(case.adapter, tmp_path / "dense", base=base, how=api.MergeOptions(samples=0))
    how = api.MergeOptions(
        quantize=scheme, samples=0, residual=api.ResidualOptions(rank=RANK, weight="norm")
    )
    report = api.merge(case.adapter, tmp_path / "out", base=base, how=how)
    assert report.residual is not None
    assert report.residual.rank == RANK
    assert len(report.residual.modules) == 2 * len(MODULES)
    assert {f for f in report.files if f.startswith("residual/")} == {
        "residual/adapter_config.json",
        "residual/adapter_model.safetensors",
    }
    with quiet():
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
        exact = outputs(dense.eval(), case.inputs)
        # In training mode bitsandbytes leaves weights and activations as they are.
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).train()
        plain = outputs(model, case.inputs)
        adapted = PeftModel.from_pretrained(model, tmp_path / "out" / "residual").train()
        corrected = outputs(adapted, case.inputs)
    before, after = ((got - exact).norm() / exact.norm() for got in (plain, corrected))
    assert after < most * before, (before, after)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_minilm_in_4_bits(minilm: Path, tmp_path: Path) -> None:
    """The trained adapter: hidden states come nearer to those of the dense merge."""
    adapter = FIXTURES / "minilm"
    ids = torch.randint(1000, 20000, (8, 32), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, how in {
        "dense": api.MergeOptions(samples=0),
        "out": api.MergeOptions(
            quantize="nf4", samples=0, residual=api.ResidualOptions(rank=64, weight="plain")
        ),
    }.items():
        api.merge(adapter, tmp_path / name, base=minilm, how=how)
        with quiet():
            found[name] = AutoModel.from_pretrained(tmp_path / name).train()
            for module in found[name].modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
    with quiet():
        exact = outputs(found["dense"], {"input_ids": ids})
        plain = outputs(found["out"], {"input_ids": ids})
        adapted = PeftModel.from_pretrained(found["out"], tmp_path / "out" / "residual").train()
        corrected = outputs(adapted, {"input_ids": ids})
    before, after = ((got - exact).norm() / exact.norm() for got in (plain, corrected))
    assert after < 0.9 * before, (before, after)
