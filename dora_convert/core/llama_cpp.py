"""What llama.cpp makes of transformers' models, as data: its names, and what it turns.

Source: its converter, conversion/*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from dora_convert.core.bundle import Json
from dora_convert.errors import MismatchError

__all__ = ["EXPERTS", "MODELS", "Model", "count_of", "turned_heads"]


class Model(NamedTuple):
    """A model of transformers in llama.cpp.

    `arch` is its name there. If `permuted`, the rows of q and k are in the order that its rotary
    embedding wants. If `shifted`, norms are stored with the 1 that transformers adds to them.
    """

    arch: str
    permuted: bool = False
    shifted: bool = False


# By class: those whose tensors are renamed and nothing else, but for what `Model` says.
MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "Gemma2ForCausalLM": Model("GEMMA2", shifted=True),
        "Gemma3ForCausalLM": Model("GEMMA3", shifted=True),
        "GemmaForCausalLM": Model("GEMMA", shifted=True),
        "GraniteForCausalLM": Model("GRANITE", permuted=True),
        "LlamaForCausalLM": Model("LLAMA", permuted=True),
        "MistralForCausalLM": Model("LLAMA", permuted=True),
        "Olmo2ForCausalLM": Model("OLMO2"),
        "Phi3ForCausalLM": Model("PHI3"),
        "Qwen2ForCausalLM": Model("QWEN2"),
        "Qwen3ForCausalLM": Model("QWEN3"),
    }
)
# Those whose experts are stacked in one tensor besides.
EXPERTS: Mapping[str, Model] = MappingProxyType(
    {"Qwen2MoeForCausalLM": Model("QWEN2MOE"), "Qwen3MoeForCausalLM": Model("QWEN3MOE")}
)


def turned_heads(path: str, model: Model, config: Json) -> int:
    """In how many heads the rows of a module are reordered; 0 if they are not.

    Raises MismatchError where the config does not say how many there are.
    """
    if model.permuted and path.endswith(".q_proj"):
        return count_of(config, "num_attention_heads")
    if model.permuted and path.endswith(".k_proj"):
        grouped = config.get("num_key_value_heads") is not None
        return count_of(config, "num_key_value_heads" if grouped else "num_attention_heads")
    return 0


def count_of(config: Json, key: str) -> int:
    """A number of layers or heads. Raises MismatchError where the config has none."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MismatchError(f"the base's config.json gives no {key}", where=f"{value!r}")
    return value
