"""Which norm's gain a layer's inputs come with, by name: a table, as data.

An input that is the output of a norm has second moment diag(gain)² as far as what was normalised
has that of the identity. Other layers (o_proj, down_proj ...) see no norm's output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dora_convert.core.bundle import Json
from dora_convert.planning.names import Unsupported
from dora_convert.planning.resolve import Resolver

__all__ = ["adds_one", "norm_tensors"]

# End of a layer's path; the norms that may stand before it, the first that exists counts. `{n}` is
# the layer's number and `{before}` the one before it.
_TABLE = (
    # Llama, Mistral, Qwen, Gemma and most decoders since; Gemma 2 and 3 have a norm of their own
    # before the MLP, and post_attention_layernorm after attention.
    (r"(?P<start>.*\.)(?P<n>\d+)\.self_attn\.[qkv]_proj", ("{start}{n}.input_layernorm",)),
    (
        r"(?P<start>.*\.)(?P<n>\d+)\.mlp\.(gate|up)_proj",
        ("{start}{n}.pre_feedforward_layernorm", "{start}{n}.post_attention_layernorm"),
    ),
    # BERT and its kin: norms stand after the blocks, so the one before is the last layer's.
    (
        r"(?P<start>(?P<root>.*?)encoder\.layer\.)(?P<n>\d+)\.attention\.self\.(query|key|value)",
        ("{start}{before}.output.LayerNorm", "{root}embeddings.LayerNorm"),
    ),
    (
        r"(?P<start>.*encoder\.layer\.)(?P<n>\d+)\.intermediate\.dense",
        ("{start}{n}.attention.output.LayerNorm",),
    ),
    # GPT-2
    (r"(?P<start>.*\bh\.)(?P<n>\d+)\.attn\.c_attn", ("{start}{n}.ln_1",)),
    (r"(?P<start>.*\bh\.)(?P<n>\d+)\.mlp\.c_fc", ("{start}{n}.ln_2",)),
)
# Their norms multiply with 1 + weight.
_ADD_ONE = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})


def adds_one(config: Json) -> bool:
    """Whether the model's norms multiply with 1 + weight."""
    return config.get("model_type") in _ADD_ONE


def norm_tensors(paths: Iterable[str], names: Resolver) -> dict[str, str]:
    """The stored gain of the norm before each module, for those whose norm is known."""
    return {path: found for path in paths if (found := _gain(path, names)) is not None}


def _gain(path: str, names: Resolver) -> str | None:
    for pattern, norms in _TABLE:
        found = re.fullmatch(pattern, path)
        if found is None:
            continue
        parts = found.groupdict() | {"before": str(int(found["n"]) - 1)}
        for norm in norms:
            if "{root}" in norm and parts["n"] != "0":
                continue
            origin = names.find(f"{norm.format_map(parts)}.weight")
            if origin is not None and not isinstance(origin, Unsupported) and len(origin) == 1:
                return origin[0].tensor
    return None
