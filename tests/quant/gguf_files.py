"""GGUF files as llama.cpp lays them out, by gguf's own writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

# Those that gguf can decode; a block of each is written as random bytes.
KINDS = [kind for kind in Kind if kind in gguf.quants._type_traits]
_NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}


def stored_name(name: str) -> str:
    """The name that llama.cpp gives a weight of Llama, Qwen 2 or Qwen 3."""
    *_, leaf, suffix = name.split(".")
    if name == "model.norm.weight":
        return "output_norm.weight"
    parts = name.split(".")
    layer = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{layer}{_NAMES[leaf]}.{suffix}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of a Llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Any bytes are a tensor; those of scales are made finite."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    made = generator.integers(0, 256, (rows, columns // elements, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(made.reshape(rows, -1), kind)
    values = values.reshape(*made.shape[:2], -1)
    made[~np.isfinite(values).all(axis=2) | (np.abs(values) > 100).any(axis=2)] = 0
    return made.reshape(rows, -1)


def coded(values: np.ndarray, kind: Kind) -> np.ndarray:
    return np.ascontiguousarray(gguf.quants.quantize(values, kind))


def write_model(
    model: PreTrainedModel,
    file: Path,
    kind_of: Callable[[str], Kind],
    *,
    arch: str = "llama",
    extra: Mapping[str, np.ndarray] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """The model's weights, matrices in the type that `kind_of` their name says, vectors in F32."""
    config = model.config
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list(["a", "bc", "def"])
    for key, text in (texts or {}).items():
        writer.add_string(key, text)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if arch == "llama" and "q_proj" in name:
            values = permuted(values, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            values = permuted(values, config.num_key_value_heads)
        kind = kind_of(name) if weight.dim() > 1 else Kind.F32
        writer.add_tensor(stored_name(name), coded(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(file.parent)


def write_tensors(file: Path, tensors: Mapping[str, tuple[np.ndarray, Kind]], arch: str) -> None:
    """A file with nothing else in it but its model's name."""
    writer = gguf.GGUFWriter(file, arch)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_config(folder: Path, **changes: object) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "dtype": "float32",
    } | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def as_torch(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
