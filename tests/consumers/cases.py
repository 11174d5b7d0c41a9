"""A DoRA on a tiny model of each kind, and the truncated LoRA as PEFT computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from dora_convert import api
from dora_convert.core.lora import RankChoice
from tests.oracles.models import Trained, outputs, quiet, tokens, train

VOCABULARY = 96
RANK = 5
MODELS = {
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "granite": GraniteConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "olmo2": Olmo2Config,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# As their real models are; mlx-lm knows no other head for them.
TIED = ("gemma", "gemma2", "gemma3_text")
# Where another program goes by a default of its own, transformers is told the same.
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"num_hidden_layers": 6},  # five local layers to each global one
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def targets(kind: str) -> list[str]:
    return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if kind == "phi3" else ALL


def model(kind: str, *, width: int = 64) -> PreTrainedModel:
    """Two layers (Gemma 3: six), with fewer keys than queries."""
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": kind in TIED,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = MODELS[kind](**(shape | SPECIAL.get(kind, {})))
    with quiet():
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.mul_(1 + torch.rand(weight.shape[0], 1))
    return made


@dataclass
class Case:
    """A base and a DoRA on it; `lora` makes a LoRA of it in a new folder."""

    trained: Trained
    folder: Path

    @property
    def base(self) -> Path:
        return self.trained.base

    def lora(self, stack: str, form: str | None = None, rank: int = RANK, **how: Any) -> Path:
        out = self.folder / f"{stack}-{form}-{rank}"
        if not out.exists():
            options = api.LoraOptions(choice=RankChoice(rank=rank), stack=stack, form=form, **how)
            api.to_lora(self.trained.adapter, out, base=self.base, how=options)
        return out

    def base_outputs(self) -> Tensor:
        return outputs(_load(self.base), tokens(VOCABULARY))

    def peft_outputs(self, lora: Path) -> Tensor:
        """PEFT's logits with this LoRA, not merged."""
        with quiet():
            loaded = PeftModel.from_pretrained(_load(self.base), lora).eval()
        return outputs(loaded, tokens(VOCABULARY))


def _load(base: Path) -> PreTrainedModel:
    with quiet():
        found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return found.eval()


def case(
    folder: Path,
    kind: str,
    modules: Sequence[str] | None = None,
    change: Callable[[PeftModel], None] | None = None,
    **how: Any,
) -> Case:
    made = train(
        folder,
        model(kind, **how),
        tokens(VOCABULARY),
        target_modules=list(modules or targets(kind)),
        change=change,
        r=4,
    )
    return Case(made, folder)


def ids() -> list[list[int]]:
    return tokens(VOCABULARY)["input_ids"].tolist()
