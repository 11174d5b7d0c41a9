"""A random checkpoint in the shape of a Llama, with a DoRA adapter, streamed to disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file

__all__ = ["LLAMA_1B", "TINY", "Shape", "make", "write_header", "write_tensor"]

RANK = 16
ALPHA = 32
SHARD_BYTES = 1_000_000_000
BLOCK = 1 << 22  # elements drawn at a time
MARKER = "made.json"


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that decide how much work a merge is."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocab: int = 128256

    def linears(self) -> dict[str, tuple[int, int]]:
        """`[out, in]` of every linear of one layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint; input and output embeddings are one."""
        shapes: dict[str, tuple[int, ...]] = {}
        shapes["model.embed_tokens.weight"] = (self.vocab, self.hidden)
        for n in range(self.layers):
            layer = f"model.layers.{n}."
            shapes[layer + "input_layernorm.weight"] = (self.hidden,)
            shapes[layer + "post_attention_layernorm.weight"] = (self.hidden,)
            for name, shape in self.linears().items():
                shapes[f"{layer}{name}.weight"] = shape
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes

    def nbytes(self) -> int:
        """Bytes of the bf16 checkpoint's tensors."""
        return sum(2 * torch.Size(shape).numel() for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        """What transformers needs to build the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }


LLAMA_1B = Shape()
TINY = Shape(layers=2, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16, vocab=512)


def make(folder: Path, shape: Shape) -> tuple[Path, Path]:
    """Write `folder`/base and `folder`/adapter, or find them there; returns both."""
    base, adapter, marker = folder / "base", folder / "adapter", folder / MARKER
    wanted = json.dumps(asdict(shape))
    if not (marker.exists() and marker.read_text() == wanted):
        base.mkdir(parents=True, exist_ok=True)
        adapter.mkdir(exist_ok=True)
        norms = _write_base(base, shape)
        _write_adapter(adapter, shape, norms)
        marker.write_text(wanted)
    return base, adapter


def _write_base(folder: Path, shape: Shape) -> dict[str, torch.Tensor]:
    """Write the sharded checkpoint; returns the row norms of its matrices by tensor name."""
    shards = list(_shards(shape.tensors()))
    weight_map, norms = {}, {}
    generator = torch.Generator().manual_seed(0)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        with (folder / name).open("wb") as file:
            write_header(file, shard)
            for tensor, size in shard.items():
                norms[tensor] = write_tensor(file, size, generator)
    index = {"metadata": {"total_size": shape.nbytes()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    return norms


def _shards(tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Fill files in model order; within one, sort by name as safetensors does."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in tensors.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shard and size + nbytes > SHARD_BYTES:
            yield dict(sorted(shard.items()))
            shard, size = {}, 0
        shard[name] = shape
        size += nbytes
    yield dict(sorted(shard.items()))


def write_header(file: BinaryIO, shard: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shard.items():
        end = start + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def write_tensor(
    file: BinaryIO, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """Norm weights are ones, matrices normal with std 0.02; returns the row norms."""
    if len(shape) == 1:
        _write(file, torch.ones(shape))
        return torch.empty(0)
    rows, columns = shape
    norms = []
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = torch.randn(count, columns, generator=generator) * 0.02
        norms.append(_write(file, block).float().norm(dim=1))
    return torch.cat(norms)


def _write(file: BinaryIO, block: torch.Tensor) -> torch.Tensor:
    stored = block.bfloat16()
    file.write(stored.view(torch.uint8).numpy().data)
    return stored


def _write_adapter(folder: Path, shape: Shape, norms: dict[str, torch.Tensor]) -> None:
    """Write a PEFT DoRA on every linear, as if trained: A as initialized, B and m moved."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for n in range(shape.layers):
        for name, (rows, columns) in shape.linears().items():
            path = f"model.layers.{n}.{name}"
            key = f"base_model.model.{path}."
            bound = columns**-0.5
            down = torch.empty(RANK, columns).uniform_(-bound, bound, generator=generator)
            drift = 1 + 0.02 * torch.randn(rows, generator=generator)
            tensors[key + "lora_A.weight"] = down
            tensors[key + "lora_B.weight"] = 0.005 * torch.randn(rows, RANK, generator=generator)
            tensors[key + "lora_magnitude_vector"] = norms[path + ".weight"] * drift
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "use_dora": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-1] for name in shape.linears()}),
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
