"""The rules of loaders that do not run here, each with its source, on what is written for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from dora_convert import api
from dora_convert.core.lora import RankChoice
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, MismatchError
from dora_convert.planning.stacks import STACKS, WITHOUT_LORA
from tests.consumers.cases import Case, case

FOLDERS = [name for name, stack in STACKS.items() if "peft" in stack.forms]
LAYERS = 2
PREFIX = "base_model.model."
DTYPE = DType.F16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Adapted unevenly: one module in one layer, a gate without its up."""
    modules = ["layers.1.self_attn.q_proj", "layers.0.mlp.gate_proj", "o_proj"]
    return case(tmp_path_factory.mktemp("rules"), "llama", modules)


def read(made: Case, stack: str, **how: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = made.lora(stack, "peft", **how)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def present(tensors: Mapping[str, Tensor]) -> dict[str, set[int]]:
    """In which layers each kind of module has a pair."""
    found: dict[str, set[int]] = {}
    for name in tensors:
        match = re.fullmatch(r".*layers\.(\d+)\.[a-z_]+\.([a-z_]+)\.lora_A\.weight", name)
        if match:
            found.setdefault(match[2], set()).add(int(match[1]))
    return found


@pytest.mark.parametrize("stack", FOLDERS)
def test_keys_and_switches(made: Case, stack: str) -> None:
    """vLLM lora/peft_helper.py, Aphrodite's copy, SGLang lora/lora.py, TGI adapters/lora.py."""
    config, tensors = read(made, stack)
    for name in tensors:
        assert re.fullmatch(rf"{re.escape(PREFIX)}[a-z_.0-9]+\.lora_[AB]\.weight", name), name
    for a in [name for name in tensors if ".lora_A." in name]:
        b = a.replace("lora_A", "lora_B")
        assert tensors[a].shape[0] == tensors[b].shape[1] == config["r"]
    assert config["lora_alpha"] == config["r"]  # scale 1, by alpha / r and by alpha / rank
    assert type(config["lora_alpha"]) is int  # Ollama, convert.go: uint32
    assert config["use_dora"] is config["use_rslora"] is config["fan_in_fan_out"] is False
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None  # Aphrodite
    assert config["init_lora_weights"] is True  # vLLM: no pissa, olora, corda, loftq
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert isinstance(config["target_modules"], list)  # SGLang, lora_manager.py: no regex


@pytest.mark.parametrize("stack", [n for n in FOLDERS if STACKS[n].complete])
def test_complete(made: Case, stack: str) -> None:
    """SGLang lora.py: q goes with k and v, gate with up; TGI models/__init__.py and LoRAX: a kind
    of module that one layer lacks is dropped in all; LMDeploy adapter.py: what is listed but has
    no tensor keeps memory that was never set; TensorRT-LLM manager.py: q, k and v are one.
    """
    config, tensors = read(made, stack)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert present(tensors) == {kind: set(range(LAYERS)) for kind in kinds}
    assert set(config["target_modules"]) == kinds
    for name in ("layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"):
        assert not tensors[f"{PREFIX}model.{name}.lora_B.weight"].any()


@pytest.mark.parametrize("stack", [n for n in FOLDERS if STACKS[n].ranks])
def test_ranks_are_listed(made: Case, stack: str) -> None:
    """vLLM config/lora.py, MaxLoRARanks; TGI pads to 8, and TensorRT-LLM misaligns below 8."""
    for rank in (1, 5, 9, 33):
        config, _ = read(made, stack, rank=rank)
        assert config["r"] in (8, 16, 32, 64, 128, 256, 320, 512)
        assert config["r"] >= rank


def ollama(first: Tensor, second: Tensor) -> bool:
    """convert_llama_adapter.go: both are taken for turned round if A is taller than wide."""
    return first.shape[0] > first.shape[1] or second.shape[0] < second.shape[1]


@pytest.mark.parametrize("rank", [3, 31, 32, 64])
def test_ollama_reads_the_right_way_round(made: Case, rank: int) -> None:
    config, tensors = read(made, "ollama", rank=rank)
    assert config["r"] <= min(rank, 63)
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            assert not ollama(a, b)
            assert config["r"] < min(a.shape[1], b.shape[0])


def test_ollama_gets_a_smaller_rank_and_says_so(made: Case, tmp_path: Path) -> None:
    for rank, said in ((31, False), (64, True)):
        how = api.LoraOptions(choice=RankChoice(rank=rank), stack="ollama", form="peft")
        out = tmp_path / str(rank)
        report = api.to_lora(made.trained.adapter, out, base=made.base, how=how)
        assert any(f"not {rank}: Ollama" in note for note in report.notes) == said


def test_ollama_takes_few_models(tmp_path: Path) -> None:
    """convert/convert.go: "unsupported architecture"; GGUF adapters go by llama.cpp's rules."""
    qwen = case(tmp_path, "qwen2", ["q_proj"])
    with pytest.raises(MismatchError) as caught:
        qwen.lora("ollama", "peft")
    assert "Qwen2ForCausalLM" in caught.value.problems[0]
    assert (qwen.lora("ollama") / "adapter.gguf").exists()


def test_exllama_reads_float16(made: Case) -> None:
    """exllamav2/lora.py stores float16, and knows what lies in model.layers alone."""
    _, tensors = read(made, "exllamav2")
    for name, tensor in tensors.items():
        assert name.startswith(f"{PREFIX}model.layers.")
        assert tensor.half().isfinite().all()
        assert float((tensor.half().float() - tensor).norm() / tensor.norm()) < 1e-3


def test_exllama_refuses_what_does_not_fit_float16(tmp_path: Path) -> None:
    def grow(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1e10)

    huge = case(tmp_path, "llama", ["q_proj"], grow)
    assert huge.lora("peft").exists()
    for stack, how in (("exllamav2", {}), ("peft", {"dtype": DTYPE})):
        with pytest.raises(MismatchError, match="float16"):
            huge.lora(stack, rank=4, **how)
        assert not (huge.folder / f"{stack}-None-4").exists()


@pytest.mark.parametrize("stack", WITHOUT_LORA)
def test_stacks_that_load_none(made: Case, stack: str) -> None:
    """TabbyAPI backends/exllamav3/model.py: not hooked up; CTranslate2 has no such code."""
    with pytest.raises(InputError, match="no LoRA at all") as caught:
        made.lora(stack)
    assert "dora-convert merge" in caught.value.hint


@pytest.mark.parametrize(
    ("stack", "form"), [("vllm", "gguf"), ("mlx", "peft"), ("comfyui", "peft"), ("peft", "mlx")]
)
def test_formats_that_a_stack_does_not_load(made: Case, stack: str, form: str) -> None:
    with pytest.raises(InputError, match=f"in the file format {form}") as caught:
        made.lora(stack, form)
    assert caught.value.hint == f"It loads: {', '.join(STACKS[stack].forms)}."


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_the_same_bytes_whatever_the_threads(made: Case, form: str, tmp_path: Path) -> None:
    again = Case(made.trained, tmp_path)
    one, two = made.lora("any", form, workers=1), again.lora("any", form, workers=2)
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in two.iterdir())
    assert [(one / n).read_bytes() for n in names] == [(two / n).read_bytes() for n in names]


def test_gguf_is_the_peft_folder_in_other_names(tmp_path: Path) -> None:
    """Rows of q and k turned back by transformers' reader of GGUF; an embedding's A transposed."""
    uneven = case(tmp_path, "llama", ["q_proj", "k_proj", "up_proj", "embed_tokens", "lm_head"])
    stored = load_file(uneven.lora("llama.cpp", "peft") / "adapter_model.safetensors")
    heads = {"attn_q": (4, 4), "attn_k": (4, 2)}
    names = {
        "token_embd": "embed_tokens", "output": "lm_head", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "ffn_up": "mlp.up_proj",
    }  # fmt: skip
    read = GGUFReader(uneven.lora("llama.cpp") / "adapter.gguf").tensors
    assert len(read) == len(stored) == 16
    for tensor in read:
        block, _, rest = str(tensor.name).removeprefix("blk.").rpartition(".weight.lora_")
        number, _, leaf = block.rpartition(".")
        values, end = np.array(tensor.data), rest.upper()
        if leaf in heads and end == "B":
            values = LlamaTensorProcessor()._reverse_permute_weights(values, *heads[leaf])
        path = f"model.layers.{number}.{names[leaf]}" if number else names[leaf]
        path = f"model.{path}" if leaf == "token_embd" else path
        if leaf == "token_embd":
            goal = stored[f"{PREFIX}{path}.lora_embedding_{end}"]
            goal = goal.T if end == "A" else goal
        else:
            goal = stored[f"{PREFIX}{path}.lora_{end}.weight"]
        assert np.array_equal(values, goal.numpy()), tensor.name
