"""GGUF adapters: what is refused before any work, and what the bytes say to gguf's own reader."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from dora_convert.core.adapter import Adapter
from dora_convert.core.lora import LoraLayer
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, MismatchError
from dora_convert.loras import loras
from dora_convert.planning.lora import Lora, lora_layers
from dora_convert.planning.planner import plan_merge
from dora_convert.planning.stacks import STACKS
from tests.core.values import adapter, checkpoint, dora

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q = "model.layers.0.self_attn.q_proj"


def lora(config: dict[str, Any] = CONFIG, path: str = Q, rows: int = 8) -> Lora:
    trained: Adapter = adapter(dora(path, rows, 6))
    base = checkpoint({f"{path}.weight": (rows, 6)}, config)
    proposal = plan_merge(trained, base)
    layers: list[LoraLayer] = lora_layers(trained, base, proposal, STACKS["llama.cpp"])
    return Lora(trained, config, proposal.names, layers, {path: 3}, DType.F16)


def test_the_file_by_another_reader(tmp_path: Path) -> None:
    planned = loras.get("gguf").lay_out(lora())
    (pair,) = planned.pairs
    content = bytearray(planned.head.ljust(planned.size, b"\0"))
    down = np.arange(18, dtype=np.float16).reshape(3, 6)
    up = np.arange(24, dtype=np.float16).reshape(8, 3)
    for factor, values in ((pair.down, down), (pair.up, up)):
        start = planned.starts[factor.spec.name]
        assert start % 32 == 0
        content[start : start + values.nbytes] = values.tobytes()
    file = tmp_path / planned.name
    file.write_bytes(content)
    read = GGUFReader(file)
    assert {t.name: t.data.tolist() for t in read.tensors} == {
        "blk.0.attn_q.weight.lora_a": down.tolist(),
        "blk.0.attn_q.weight.lora_b": up.tolist(),
    }
    assert read.fields["adapter.lora.alpha"].contents() == 3
    assert pair.up.heads == 4
    assert pair.down.heads == 0


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="a GGUF file needs gguf") as caught:
        loras.get("gguf").lay_out(lora())
    assert caught.value.hint == 'pip install "dora-convert[gguf]"'


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel cannot be written"),
        ({"architectures": None}, "missing cannot be written"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_what_the_config_must_tell(change: dict[str, Any], words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        loras.get("gguf").lay_out(lora(CONFIG | change))


def test_heads_of_keys() -> None:
    path = Q.replace("q_proj", "k_proj")
    (pair,) = loras.get("gguf").lay_out(lora(path=path)).pairs
    assert pair.up.heads == 2
    plain = CONFIG | {"num_key_value_heads": None}
    (pair,) = loras.get("gguf").lay_out(lora(plain, path)).pairs
    assert pair.up.heads == 4


@pytest.mark.parametrize(
    ("path", "rows", "words"),
    [
        ("model.layers.0.mlp.gate_up_proj_x", 8, "no tensor for it"),
        ("model.layers.7.self_attn.q_proj", 8, "no tensor for it"),
        (Q, 6, "6 rows do not divide into 4 heads"),
    ],
)
def test_modules_without_a_place(path: str, rows: int, words: str) -> None:
    with pytest.raises(MismatchError) as caught:
        loras.get("gguf").lay_out(lora(path=path, rows=rows))
    (problem,) = caught.value.problems
    assert problem == f"{path}: {words}" if rows == 6 else words in problem
    assert "convert_lora_to_gguf.py" in caught.value.hint


def test_mlx_models_that_are_not_known() -> None:
    with pytest.raises(MismatchError, match="'gpt2'"):
        loras.get("mlx").lay_out(replace(lora(), config={"model_type": "gpt2"}))
