"""What a model's config tells about its layers and embeddings: tables, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dora_convert.core.bundle import Json

__all__ = [
    "head_of",
    "input_embedding",
    "is_tied",
    "model_types",
    "quantization",
    "text_configs",
    "ties_masked_head",
    "transposed_leaves",
]

# Layers of transformers' class Conv1D, whose weight is stored [in, out] (pytorch_utils.py).
_CONV1D: Mapping[str, frozenset[str]] = {
    "gpt2": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
    "imagegpt": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "decision_transformer": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "clvp_decoder": frozenset({"c_fc", "c_proj"}),
}

# The names that causal language models of transformers give to both ends.
_INPUTS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
_HEADS = ("lm_head", "embed_out", "output_projection")
_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "DoubleHeadsModel")
_MASKED = ("ForMaskedLM", "ForPreTraining")


def _configs(config: Json) -> Iterator[Json]:
    """The config and all that are nested in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _configs(value)


def model_types(config: Json) -> frozenset[str]:
    """Every `model_type` in the config, nested ones too."""
    found = (c.get("model_type") for c in _configs(config))
    return frozenset(t for t in found if isinstance(t, str))


def transposed_leaves(config: Json) -> frozenset[str]:
    """Last parts of the paths of modules whose weight is stored `[in, out]`."""
    empty: frozenset[str] = frozenset()
    return empty.union(*(_CONV1D.get(t, empty) for t in model_types(config)))


def text_configs(config: Json) -> list[str]:
    """Keys of the nested configs that describe a language model."""
    return [
        key
        for key in ("text_config", "llm_config", "language_config", "decoder")
        if isinstance(config.get(key), dict)
    ]


def quantization(config: Json) -> str | None:
    """The quantisation method that the config declares, if any."""
    for part in (config, *(config[key] for key in text_configs(config))):
        declared = part.get("quantization_config")
        if isinstance(declared, dict):
            return str(declared.get("quant_method", "unknown"))
    return None


def input_embedding(path: str) -> bool:
    """Whether a module path is that of an input embedding over the vocabulary."""
    return path.rpartition(".")[2] in _INPUTS


def head_of(path: str) -> bool:
    """Whether a module path is that of an output head over the vocabulary."""
    return path.rpartition(".")[2] in _HEADS


def is_tied(config: Json, *, head_stored: bool) -> bool:
    """Whether input and output embedding of a causal language model are one tensor.

    Transformers leaves the head out of the file when they are; the flag's default depends on the
    model, so a missing head counts as much. A model without such a head is not tied, whatever its
    config says.
    """
    names = _architectures(config)
    if names and not any(name.endswith(_HEADED) for name in names):
        return False
    return _declared_tied(config) is True or (bool(names) and not head_stored)


def ties_masked_head(config: Json) -> bool:
    """Whether the output side of a masked language model shares the embedding's weight."""
    masked = any(name.endswith(_MASKED) for name in _architectures(config))
    return masked and _declared_tied(config) is not False


def _architectures(config: Json) -> list[str]:
    names = config.get("architectures")
    return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []


def _declared_tied(config: Json) -> bool | None:
    parts = (config, *(config[key] for key in text_configs(config)))
    flags = [part.get("tie_word_embeddings") for part in parts]
    return next((True for flag in flags if flag is True), None if None in flags else False)
