"""Adapters on GGUF bases: the weights as transformers loads them, and merges by the formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from dora_convert import api
from dora_convert.core.lora import RankChoice
from dora_convert.core.tensors import DType
from tests.quant.gguf_files import write_model

from .models import Trained, distance, load, merged_by_formula, outputs, quiet, tokens, train

WIDTH = 128


def kind_of(name: str) -> Kind:
    """As in the mixtures that llama.cpp makes."""
    if "embed" in name or "lm_head" in name:
        return Kind.F16
    if "v_proj" in name or "down_proj" in name:
        return Kind.Q8_0
    return {"q": Kind.Q5_1, "k": Kind.Q4_0, "o": Kind.BF16}.get(name.split(".")[-2][0], Kind.Q4_1)


def tiny(config: type[LlamaConfig | Qwen2Config | Qwen3Config], **changes: object) -> LlamaConfig:
    made: LlamaConfig = config(
        **{
            "vocab_size": 96,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": WIDTH // 4,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        | changes
    )
    return made


def gguf_model(folder: Path, config: LlamaConfig) -> PreTrainedModel:
    """The file is written, and loaded by transformers."""
    torch.manual_seed(9)
    folder.mkdir()
    with quiet():
        made = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight in made.parameters():
                if weight.dim() == 1:
                    weight.copy_(torch.rand_like(weight) + 0.5)
        write_model(made, folder / "model.gguf", kind_of, arch=config.model_type)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32
        )
    return loaded.eval()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("gguf")
    model = gguf_model(folder / "base", tiny(LlamaConfig))
    modules = ["q_proj", "k_proj", "v_proj", "down_proj", "gate_proj"]
    return train(folder, model, tokens(), base=folder / "base", target_modules=modules)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 128}),  # transformers goes by that default
    ],
)
def test_all_weights_are_those_of_transformers(
    config: type[LlamaConfig], changes: dict[str, object], tmp_path: Path
) -> None:
    model = gguf_model(tmp_path / "base", tiny(config, **changes))
    trained = train(tmp_path, model, tokens(), base=tmp_path / "base", target_modules=["o_proj"])
    out = tmp_path / "out"
    # Nothing is merged where the adapter is left out, so that all of the base shows.
    how = api.MergeOptions(dtype=DType.F32)
    read = api.ReadOptions(exclude=["*layers.1*"])
    api.merge(trained.adapter, out, base=trained.base, options=read, how=how)
    got = load_file(out / "model.safetensors")
    want = {k.removeprefix("base_model.model.").replace(".base_layer", ""): v
            for k, v in model.state_dict().items() if ".lora_" not in k}  # fmt: skip
    if "tie_word_embeddings" in changes:
        del want["lm_head.weight"]
    assert got.keys() == want.keys()
    merged = {name for name in want if not torch.equal(got[name], want[name])}
    assert merged == {"model.layers.0.self_attn.o_proj.weight"}


def test_merge_is_dense_and_exact(case: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = api.merge(case.adapter, out, base=case.base, how=api.MergeOptions(dtype=DType.F32))
    assert any("gguf" in note for note in report.notes)
    api.verify(out, adapter=case.adapter, base=case.base, samples=None)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(
            case.base, gguf_file="model.gguf", dtype=torch.float32
        ).state_dict()
    got = load_file(out / "model.safetensors")
    adapter = load_file(case.adapter / "adapter_model.safetensors")
    assert got.keys() == base.keys()
    for name in got:
        exact = merged_by_formula(name.removesuffix(".weight"), base[name], adapter, scaling=2.0)
        assert (got[name].double() - exact).abs().max() < 2e-7
    model = load(out, AutoModelForCausalLM)
    assert distance(outputs(model, case.inputs), case.outputs) < 1e-5


def test_the_same_bytes_whatever_the_workers(case: Trained, tmp_path: Path) -> None:
    for workers in (1, 3):
        how = api.MergeOptions(workers=workers)
        base = case.base / "model.gguf"
        api.merge(case.adapter, tmp_path / str(workers), base=base, how=how)
    one, three = (tmp_path / n / "model.safetensors" for n in "13")
    assert one.read_bytes() == three.read_bytes()


def test_to_lora_over_it(case: Trained, tmp_path: Path) -> None:
    """At full rank the LoRA on the base is the DoRA on it."""
    how = api.LoraOptions(choice=RankChoice(rank=WIDTH), stack="peft")
    report = api.to_lora(case.adapter, tmp_path / "lora", base=case.base, how=how)
    assert report.residual < 1e-3
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            case.base, gguf_file="model.gguf", dtype=torch.float32
        )
        adapted = PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    assert distance(outputs(adapted, case.inputs), case.outputs) < 1e-3


def test_inspect_knows_the_magnitudes(case: Trained) -> None:
    found = api.inspect(case.adapter, base=case.base)
    assert found.base is not None
    assert found.total is not None
    assert found.total.magnitude_shift < 0.2
    assert "quantised (gguf)" in found.notes[0]
    assert len(found.notes) == 1


@pytest.mark.parametrize("scheme", ["w8a8", "fp8_dynamic", "nf4"])
def test_into_another_scheme(scheme: str, case: Trained, tmp_path: Path) -> None:
    """The bytes are those of a dense base with the same weights."""
    dense = tmp_path / "dense"
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            case.base, gguf_file="model.gguf", dtype=torch.float32
        )
        model = LlamaForCausalLM(tiny(LlamaConfig))
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(dense)
    how = api.MergeOptions(quantize=scheme)
    for name, base in (("one", case.base), ("two", dense)):
        api.merge(case.adapter, tmp_path / name, base=base, how=how)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        # That of o_proj is bfloat16 in the file, and quantised from there.
        if one[name].dtype.itemsize == 1 and "o_proj" not in name:
            assert torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)), name
