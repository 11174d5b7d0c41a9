"""The folder that PEFT saves: https://huggingface.co/docs/peft/developer_guides/checkpoint."""

from __future__ import annotations

from dora_convert.core.adapter import LayerKind
from dora_convert.core.bundle import json_text
from dora_convert.core.lora import LoraLayer
from dora_convert.core.pairs import Factor, LoraFile, Pair
from dora_convert.core.peft_files import PEFT_PREFIX
from dora_convert.core.plan import WrittenFile
from dora_convert.core.tensors import TensorSpec
from dora_convert.planning.lora import Lora, factor_shapes, suffixes
from dora_convert.storage.pairs import safetensors_file

__all__ = ["FORMAT"]


class _Peft:
    title = "PEFT"

    def lay_out(self, lora: Lora) -> LoraFile:
        pairs = [_pair(layer, lora) for layer in lora.layers]
        documents = [WrittenFile("adapter_config.json", _config(lora))]
        return safetensors_file("adapter_model.safetensors", pairs, documents)


def _pair(layer: LoraLayer, lora: Lora) -> Pair:
    down, up = factor_shapes(layer, lora.ranks[layer.path])
    embedding = layer.kind is LayerKind.EMBEDDING
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else _LINEAR
    names = (f"{PEFT_PREFIX}{layer.path}.{end}" for end in ends)
    a, b = (
        Factor(TensorSpec(name, lora.dtype, shape))
        for name, shape in zip(names, (down, up), strict=True)
    )
    return Pair(layer, a, b)


_LINEAR = ("lora_A.weight", "lora_B.weight")


def _config(lora: Lora) -> str:
    """Scale 1 everywhere, since alpha equals rank; ranks below the largest go into patterns."""
    rank = lora.rank
    patterns = {path: r for path, r in sorted(lora.ranks.items()) if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": lora.adapter.task,
        "base_model_name_or_path": lora.adapter.base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": suffixes([layer.path for layer in lora.layers], lora.names),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": any(layer.flipped for layer in lora.layers),
        "modules_to_save": None,
        "inference_mode": True,
    }
    return json_text(config)


FORMAT = _Peft()
