"""Write tests/data/module_names.json: where transformers keeps each module tensor on disk.

Found by value, not by rule: a tiny model with random weights is saved, and every tensor of its
module tree is looked for among the rows of the stored ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

TARGET = Path(__file__).parent.parent / "tests" / "data" / "module_names.json"

# Sizes that differ, so that no tensor fits in another's place by accident.
TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 3,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "decoder_sparse_step": 1,
}
LLAMA = {"model_type": "llama", **TEXT}
CLIP = {"model_type": "clip_vision_model", **VISION}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
QWEN_TEXT = {**TEXT, "rope_parameters": ROPE}
QWEN_VISION = {"depth": 1, "num_heads": 2, "in_channels": 3, "patch_size": 4}
QWEN_IDS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5}

# Class, model type, settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", TEXT),
    "llava": (
        "LlavaForConditionalGeneration",
        "llava",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 3},
    ),
    "llava_mixtral": (
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": {"model_type": "mixtral", **TEXT, **EXPERTS},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "image_token_index": 3,
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "paligemma",
        {
            "text_config": {"model_type": "gemma", **TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {
            "text_config": {"model_type": "gemma3_text", **TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {
            "text_config": QWEN_TEXT,
            "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 16},
            **QWEN_IDS,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        {
            "text_config": QWEN_TEXT,
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 16,
            },
            **QWEN_IDS,
        },
    ),
    "vit": ("ViTModel", "vit", VISION),
    "vit_classifier": ("ViTForImageClassification", "vit", VISION),
    "dinov2": ("Dinov2Model", "dinov2", VISION),
    "dinov2_swiglu": (
        "Dinov2ForImageClassification",
        "dinov2",
        {**VISION, "use_swiglu_ffn": True},
    ),
    "clip_vision": ("CLIPVisionModel", "clip_vision_model", VISION),
    "mixtral": ("MixtralForCausalLM", "mixtral", {**TEXT, **EXPERTS}),
    "phimoe": ("PhimoeForCausalLM", "phimoe", {**TEXT, **EXPERTS}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "qwen2_moe", {**TEXT, **EXPERTS}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {**TEXT, **EXPERTS}),
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox", TEXT),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "nemotron_h",
        {
            **TEXT,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
        },
    ),
    "qwen3_5_text": (
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        {
            **TEXT,
            "layer_types": ["full_attention"],
            "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
        },
    ),
    "molmo2_text": ("Molmo2TextModel", "molmo2_text", TEXT),
    "gte": ("GteModel", "gte", TEXT),
    "nomic_bert": ("NomicBertModel", "nomic_bert", TEXT),
    "olmo_hybrid": (
        "OlmoHybridForCausalLM",
        "olmo_hybrid",
        {
            **TEXT,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 6,
        },
    ),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Model", "jina_embeddings_v3", TEXT),
    "hrm_text": ("HrmTextForCausalLM", "hrm_text", TEXT),
}


def make(name: str) -> dict[str, Any]:
    """Config, stored shapes and the rows of each module tensor; null where no rows make it."""
    class_name, model_type, settings = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    model: PreTrainedModel = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
        written = json.loads((Path(folder) / "config.json").read_text())
    own = {id(tensor): key for key, tensor in reversed(model.state_dict(keep_vars=True).items())}
    tree = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    kept = {key: tree[key] for key in own.values() if tree[key].dim()}
    return {
        "config": needed(written),
        "stored": {key: list(tensor.shape) for key, tensor in sorted(stored.items())},
        "modules": {key: rows(tensor, stored) for key, tensor in sorted(kept.items())},
    }


def needed(config: dict[str, Any]) -> dict[str, Any]:
    """Keep what says which classes the model is built of, and its heads."""
    keys = ("model_type", "architectures", "num_attention_heads", "num_key_value_heads")
    out = {key: config[key] for key in keys if key in config}
    return out | {key: needed(part) for key, part in config.items() if key.endswith("_config")}


def rows(tensor: torch.Tensor, stored: dict[str, torch.Tensor]) -> list[list[Any]] | None:
    """Cover the tensor's rows by runs `[stored name, start, stop]`."""
    out: list[list[Any]] = []
    done = 0
    while done < tensor.shape[0]:
        run = longest(tensor[done:], stored)
        # A run of one row is a reordering of rows, unless that is all there is.
        if run is None or (run[2] - run[1] == 1 < tensor.shape[0]):
            return None
        out.append(run)
        done += run[2] - run[1]
    return out


def longest(tensor: torch.Tensor, stored: dict[str, torch.Tensor]) -> list[Any] | None:
    """Find the longest run of stored rows that the tensor starts with."""
    best: list[Any] | None = None
    for name, other in sorted(stored.items()):
        if other.dim() != tensor.dim() or other.shape[1:] != tensor.shape[1:]:
            continue
        starts = (other == tensor[0]).reshape(len(other), -1).all(dim=1).nonzero().flatten()
        for start in starts.tolist():
            size = min(len(other) - start, len(tensor))
            same = (other[start : start + size] == tensor[:size]).reshape(size, -1).all(dim=1)
            length = int(same.long().cumprod(0).sum())
            if best is None or length > best[2] - best[1]:
                best = [name, start, start + length]
    return best


def main(target: Path, report: Callable[[str], Any] = sys.stderr.write) -> None:
    """Write the file, one model a line; name those that cannot be built."""
    warnings.simplefilter("ignore")
    lines = []
    for name in MODELS:
        try:
            lines.append(f'"{name}": {json.dumps(make(name), separators=(",", ":"))}')
        except Exception as error:
            report(f"{name}: {error!r}\n")
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
