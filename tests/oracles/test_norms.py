"""Which norm a layer's inputs come from: the table, against what goes through real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dora_convert.planning.norms import adds_one, norm_tensors
from dora_convert.planning.resolve import resolver
from dora_convert.storage.checkpoint import open_checkpoint

from .models import quiet, tokens

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
# With how many linear layers there are behind a norm.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (DECODER, 10),
    "mistral": (DECODER, 10),
    "qwen2": (DECODER, 10),
    "qwen3": (DECODER, 10),
    "gemma": (DECODER, 10),
    "gemma2": (DECODER, 10),
    "gemma3_text": (DECODER, 10),
    "gpt2": ({"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4} | ENDS, 4),
    "bert": (DECODER | {"max_position_embeddings": 32}, 8),
}


@pytest.mark.parametrize("kind", CASES)
def test_inputs_are_the_output_of_that_norm(kind: str, tmp_path: Path) -> None:
    settings, count = CASES[kind]
    torch.manual_seed(0)
    with quiet():
        config = AutoConfig.for_model(kind, **settings)
        factory = AutoModel if kind == "bert" else AutoModelForCausalLM
        model = factory.from_config(config).eval()
        model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    linear = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    names = resolver(checkpoint, linear)
    norms = {
        path: name.removesuffix(".weight") for path, name in norm_tensors(linear, names).items()
    }
    assert len(norms) == count
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for path in norms:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, given, path=path: inputs.update({path: given[0]})
        )
    for name in set(norms.values()):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: outputs.update({name: out})
        )
    with torch.no_grad():
        model(**tokens())
    for path, name in norms.items():
        assert torch.equal(inputs[path], outputs[name]), (path, name)

    # A gain of 0 leaves nothing.
    norm = model.get_submodule(norms[next(iter(norms))])
    with torch.no_grad():
        norm.weight.fill_(-1.0 if adds_one(checkpoint.config) else 0.0)
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
        assert not norm(torch.randn(3, 32)).any()
