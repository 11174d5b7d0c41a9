"""What each serving stack reads of a plain LoRA: a table, as data, with where it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

__all__ = ["RANKS", "STACKS", "WITHOUT_LORA", "Stack", "reading"]

# The ranks that vLLM's --max-lora-rank takes (vllm/config/lora.py); others accept them too.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack's needs.

    `forms`: the file formats it loads (names of `loras`), the first by default. `ranks`: allowed
    stored ranks, None for any. `advised`: ranks above it are served badly or not at all by default.
    `patterns`: it takes a rank for each pair. `embeddings`, `heads`, `convolutions`: it loads LoRA
    on such layers; `tied`: also on the ends of a model where both are one tensor. `complete`: a
    target must be there in every layer, and with its fused siblings. `models`: the architectures
    that it takes, all if empty. `inside`: what a module's path must have in it. `slender`: a rank
    must be below both sides of a layer. `half`: it computes in float16. `launch`: what to pass to
    the server.
    """

    title: str
    forms: tuple[str, ...] = ("peft",)
    ranks: tuple[int, ...] | None = RANKS
    advised: int = 512
    patterns: bool = False
    embeddings: bool = False
    heads: bool = False
    tied: bool = False
    convolutions: bool = False
    complete: bool = True
    models: frozenset[str] = frozenset()
    inside: str = ""
    slender: bool = False
    half: bool = False
    launch: str = ""


# Of PEFT folders; its GGUF adapters are llama.cpp's.
_OLLAMA = frozenset({"Gemma2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"})

STACKS: Mapping[str, Stack] = MappingProxyType(
    {
        # The least of all the others: what no stack misreads.
        "any": Stack("every stack", forms=("peft", "gguf", "mlx"), advised=64),
        # vllm/lora/peft_helper.py, lora_model.py (0.32)
        "vllm": Stack(
            "vLLM 0.32 and later",
            patterns=True,
            embeddings=True,
            heads=True,
            complete=False,
            launch="--enable-lora --max-lora-rank {rank}",
        ),
        # aphrodite/lora/peft_helper.py: vLLM's before it read patterns
        "aphrodite": Stack("Aphrodite", launch="--enable-lora --max-lora-rank {rank}"),
        # sglang/srt/lora/lora.py, lora_manager.py, mem_pool.py (0.5)
        "sglang": Stack("SGLang", launch="--max-lora-rank {rank}"),
        # TGI: server/text_generation_server/adapters/lora.py, models/__init__.py
        "tgi": Stack("Text Generation Inference", advised=128),
        # LoRAX: server/lorax_server/adapters/lora.py, utils/punica.py (BGMV_MAX_RANK)
        "lorax": Stack("LoRAX", advised=128),
        # tensorrt_llm/_torch/peft/lora/manager.py
        "tensorrt-llm": Stack("TensorRT-LLM", advised=64, launch="max_lora_rank={rank}"),
        # lmdeploy/pytorch/adapter/adapter.py
        "lmdeploy": Stack("LMDeploy"),
        # exllamav2/lora.py; TabbyAPI loads through it
        "exllamav2": Stack(
            "ExLlamaV2", ranks=None, complete=False, inside="model.layers.", half=True
        ),
        # llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.cpp, src/llama-adapter.h
        "llama.cpp": Stack(
            "llama.cpp",
            forms=("gguf", "peft"),
            ranks=None,
            embeddings=True,
            heads=True,
            complete=False,
            launch="--lora FILE",
        ),
        # GGUF: llama.cpp's rules. PEFT folders: convert/convert.go, convert_llama_adapter.go, which
        # takes the longer side of a tensor for the layer's.
        "ollama": Stack(
            "Ollama",
            forms=("gguf", "peft"),
            ranks=None,
            complete=False,
            models=_OLLAMA,
            slender=True,
            launch="a Modelfile with ADAPTER",
        ),
        # mlx_lm/tuner/utils.py, lora.py. LoRAEmbedding is left out: where the head is tied to it,
        # the update would reach the head too (LoRAEmbedding.as_linear).
        "mlx": Stack(
            "mlx-lm",
            forms=("mlx",),
            ranks=None,
            heads=True,
            complete=False,
            launch="--adapter-path",
        ),
        # diffusers/loaders/peft.py: rank and alpha of each pair from its own shape
        "diffusers": Stack(
            "diffusers",
            forms=("diffusers", "peft"),
            ranks=None,
            patterns=True,
            convolutions=True,
            complete=False,
        ),
        # comfy/lora.py, weight_adapter/lora.py: without alpha the scale is 1
        "comfyui": Stack(
            "ComfyUI",
            forms=("comfyui",),
            ranks=None,
            patterns=True,
            convolutions=True,
            complete=False,
        ),
        # peft/tuners/lora
        "peft": Stack(
            "PEFT and transformers",
            ranks=None,
            patterns=True,
            embeddings=True,
            heads=True,
            tied=True,
            convolutions=True,
            complete=False,
        ),
    }
)

# No code for LoRA in them (CTranslate2), or none that is reached (TabbyAPI,
# backends/exllamav3/model.py).
WITHOUT_LORA: Mapping[str, str] = MappingProxyType(
    {"ctranslate2": "CTranslate2", "exllamav3": "ExLlamaV3"}
)


def reading(stack: Stack, form: str) -> Stack:
    """The stack's needs for one of its file formats: some are those of a converter of its own."""
    if form == "peft":
        return stack
    return replace(stack, models=frozenset(), slender=False)
