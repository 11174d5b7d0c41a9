"""What mlx-lm loads as `--adapter-path` (mlx_lm/tuner/utils.py, tuner/lora.py)."""

from __future__ import annotations

import re

from dora_convert.core.bundle import json_text
from dora_convert.core.lora import LoraLayer
from dora_convert.core.pairs import Factor, LoraFile, Pair
from dora_convert.core.plan import WrittenFile
from dora_convert.core.tensors import TensorSpec
from dora_convert.errors import MismatchError
from dora_convert.planning.lora import Lora, factor_shapes, spelled
from dora_convert.storage.pairs import safetensors_file

__all__ = ["FORMAT", "MODELS"]

# Models whose modules mlx-lm names as transformers does.
MODELS = frozenset({"gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"})
_BLOCK = re.compile(r"model\.layers\.\d+\.")


class _Mlx:
    title = "mlx-lm"

    def lay_out(self, lora: Lora) -> LoraFile:
        model = lora.config.get("model_type")
        if model not in MODELS:
            raise MismatchError(
                f"the names that mlx-lm gives to the modules of model type {model!r} are not known",
                hint=f"Known: {', '.join(sorted(MODELS))}. Or write a PEFT folder (--to peft).",
            )
        pairs = [_pair(layer, lora) for layer in lora.layers]
        documents = [WrittenFile("adapter_config.json", _config(lora))]
        return safetensors_file("adapters.safetensors", pairs, documents, {"format": "mlx"})


def _pair(layer: LoraLayer, lora: Lora) -> Pair:
    down, up = factor_shapes(layer, lora.ranks[layer.path])
    path = spelled(layer.path, lora.names)
    return Pair(
        layer,
        Factor(TensorSpec(f"{path}.lora_a", lora.dtype, down[::-1]), turned=True),
        Factor(TensorSpec(f"{path}.lora_b", lora.dtype, up[::-1]), turned=True),
    )


def _config(lora: Lora) -> str:
    # A key within a block is meant in every block. One without a pair here gets its own, whose
    # lora_b is zero.
    keys = {_BLOCK.sub("", spelled(layer.path, lora.names)) for layer in lora.layers}
    config = {
        "model": lora.adapter.base_model,
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": lora.rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    return json_text(config)


FORMAT = _Mlx()
