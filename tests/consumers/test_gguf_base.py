"""Bases that llama.cpp's own scripts made: the weights that went in come out again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from dora_convert.api.bases import open_base
from dora_convert.api.reading import ReadOptions
from dora_convert.core.llama_cpp import EXPERTS
from dora_convert.execution.decoding import open_reader
from tests.consumers.cases import MODELS, VOCABULARY, model
from tests.consumers.environments import call, llama_cpp
from tests.oracles.models import quiet

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
MIXTURES = {"qwen2_moe": Qwen2MoeConfig, "qwen3_moe": Qwen3MoeConfig}


def mixture(kind: str, width: int) -> PreTrainedModel:
    torch.manual_seed(7)
    config = MIXTURES[kind](
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        num_experts=3,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    with quiet():
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return made


def converted(folder: Path, kind: str, width: int = 64) -> dict[str, Tensor]:
    """`m.gguf` in `folder`, beside a config alone; returns the weights of the original."""
    made = mixture(kind, width) if kind in MIXTURES else model(kind, width=width)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 1:
                weight.copy_(torch.rand_like(weight))
    source = folder.parent / "source"
    with quiet():
        made.save_pretrained(source)
    # Gemma 3's converter counts the words of this to cut rows off that have none.
    words = {"model": {"vocab": {str(i): i for i in range(VOCABULARY)}}, "added_tokens": []}
    (source / "tokenizer.json").write_text(json.dumps(words))
    folder.mkdir()
    script = HERE / "convert_base.py"
    call(sys.executable, script, llama_cpp() / "source", source, folder / "m.gguf")
    shutil.copy(source / "config.json", folder)
    return load_file(source / "model.safetensors")


def read(path: Path) -> dict[str, Tensor]:
    base, reader = open_base(path, ReadOptions()), open_reader()
    return {name: reader.load(ref) for name, ref in base.tensors.items()}


def test_all_models_are_tried() -> None:
    made = {config.model_type.replace("_", "") for config in MIXTURES.values()}
    assert made == {name.lower().removesuffix("forcausallm") for name in EXPERTS}


@pytest.mark.parametrize("kind", sorted([*MODELS, *MIXTURES]))
def test_what_its_converter_made(kind: str, tmp_path: Path) -> None:
    want, got = converted(tmp_path / "m", kind), read(tmp_path / "m")
    assert got.keys() == want.keys()
    for name in want:
        if kind.startswith("gemma") and name.endswith("norm.weight"):  # 1 + w - 1, in float32
            assert (got[name] - want[name]).abs().max() < 2**-23
        else:
            assert torch.equal(got[name], want[name]), name


# llama.h: llama_ftype
MIXES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ4_XS": 30}


@pytest.mark.parametrize("mix", MIXES)
def test_what_its_quantiser_made(mix: str, tmp_path: Path) -> None:
    """Within the error of the type, and equal to what gguf decodes."""
    want = converted(tmp_path / "m", "llama", width=256)
    quantise = (
        "import ctypes, llama_cpp, sys; p = llama_cpp.llama_model_quantize_default_params(); "
        "p.ftype = int(sys.argv[3]); a, b = sys.argv[1].encode(), sys.argv[2].encode(); "
        "assert not llama_cpp.llama_model_quantize(a, b, ctypes.byref(p))"
    )
    file = tmp_path / "m" / "q.gguf"
    call(sys.executable, "-c", quantise, tmp_path / "m" / "m.gguf", file, str(MIXES[mix]),
         PYTHONPATH=str(llama_cpp() / "site"))  # fmt: skip
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert any(kind.startswith(mix[:3]) for kind in kinds), kinds
    got = read(file)
    assert got.keys() == want.keys()
    error = 0.4 if mix == "Q2_K" else 0.2
    for name, weight in want.items():
        assert (got[name] - weight).norm() < error * weight.norm(), name
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", gguf_file="q.gguf", dtype=torch.float32
        ).state_dict()
    assert loaded.keys() == got.keys()
    assert all(torch.equal(loaded[name], got[name]) for name in got)
