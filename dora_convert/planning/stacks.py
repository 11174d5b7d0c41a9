"""What each serving stack reads of a plain LoRA: a table, as data, with where it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["RANKS", "STACKS", "Stack"]

# The ranks that vLLM's --max-lora-rank takes (vllm/config/lora.py); others accept them too.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack's needs.

    `ranks`: allowed stored ranks, None for any. `advised`: ranks above it are served badly or not
    at all by default. `patterns`: it reads rank_pattern and alpha_pattern. `embeddings`, `heads`,
    `convolutions`: it loads LoRA on such layers. `complete`: a target must be there in every layer,
    and with its fused siblings. `launch`: what to pass to the server.
    """

    title: str
    ranks: tuple[int, ...] | None = RANKS
    advised: int = 512
    patterns: bool = False
    embeddings: bool = False
    heads: bool = False
    convolutions: bool = False
    complete: bool = True
    launch: str = ""


STACKS: Mapping[str, Stack] = MappingProxyType(
    {
        # The least of all the others: what no stack misreads.
        "any": Stack("every stack", advised=64),
        # vllm/lora/peft_helper.py, lora_model.py (0.32)
        "vllm": Stack(
            "vLLM 0.32 and later",
            patterns=True,
            embeddings=True,
            heads=True,
            complete=False,
            launch="--enable-lora --max-lora-rank {rank}",
        ),
        # sglang/srt/lora/lora.py, lora_manager.py, mem_pool.py (0.5)
        "sglang": Stack("SGLang", launch="--max-lora-rank {rank}"),
        # server/lorax_server/utils/punica.py and TGI's copy of it
        "tgi": Stack("Text Generation Inference, LoRAX", advised=128),
        # tensorrt_llm/_torch/peft/lora/manager.py
        "tensorrt-llm": Stack("TensorRT-LLM", advised=64, launch="max_lora_rank={rank}"),
        # lmdeploy/pytorch/adapter/adapter.py
        "lmdeploy": Stack("LMDeploy"),
        # llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.cpp
        "llama.cpp": Stack(
            "llama.cpp, through its convert_lora_to_gguf.py",
            ranks=None,
            embeddings=True,
            heads=True,
            complete=False,
        ),
        # peft/tuners/lora
        "peft": Stack(
            "PEFT and transformers",
            ranks=None,
            patterns=True,
            embeddings=True,
            heads=True,
            convolutions=True,
            complete=False,
        ),
    }
)
