"""What a model's config tells about its layers and embeddings: tables, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from dora_convert.core.bundle import Json
from dora_convert.core.embeddings import HEADS, INPUTS
from dora_convert.core.globs import matches_any
from dora_convert.core.quantized import DECLARED_IN

__all__ = [
    "HEAD_TASKS",
    "head_of",
    "input_embedding",
    "is_tied",
    "language_head",
    "model_types",
    "quantization",
    "task_head",
    "text_configs",
    "ties_masked_head",
    "transposed_modules",
]

# Tasks for which PEFT puts a new head on the model, which no base checkpoint holds.
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

# Layers of transformers' class Conv1D, whose weight is stored [in, out] (pytorch_utils.py).
_CONV1D: Mapping[str, frozenset[str]] = {
    "gpt2": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
    "imagegpt": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "decision_transformer": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "clvp_decoder": frozenset({"c_fc", "c_proj"}),
}

_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "DoubleHeadsModel")
_MASKED = ("ForMaskedLM", "ForPreTraining")
# Classes without a head over the vocabulary; a name that says nothing may have one.
_HEADLESS = re.compile(
    r"(Classification|QuestionAnswering|MultipleChoice|Encoder|"
    r"(?<!LMHead)(?<!DoubleHeads)(?<!Chat)Model)$"
)
# Where heads of language models stand in transformers' classes: BERT, RoBERTa, DistilBERT, ALBERT,
# ELECTRA, MobileBERT.
_HEAD_ROOTS = frozenset(
    {"cls", "lm_head", "vocab_transform", "vocab_layer_norm", "vocab_projector", "predictions"}
    | {"generator_predictions", "generator_lm_head", "discriminator_predictions"}
)
# The heads of classifiers and of extractive question answering.
_TASK_HEADS = frozenset(
    {"score", "classifier", "classification_head", "qa_outputs", "logits_proj", "pre_classifier"}
)


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


def _transposed_leaves(config: Json) -> frozenset[str]:
    """Last parts of the paths of modules whose weight is stored `[in, out]`."""
    empty: frozenset[str] = frozenset()
    return empty.union(*(_CONV1D.get(t, empty) for t in model_types(config)))


def transposed_modules(config: Json, globs: Sequence[str]) -> Callable[[str], bool]:
    """Whether the weight at a path is stored `[in, out]`, by its class or by `globs`."""
    leaves = _transposed_leaves(config)
    return lambda path: path.rpartition(".")[2] in leaves or matches_any(path, globs)


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
        for key, default in DECLARED_IN.items():
            declared = part.get(key)
            if isinstance(declared, dict):
                return str(declared.get("quant_method", default))
    return None


def input_embedding(path: str) -> bool:
    """Whether a module path is that of an input embedding over the vocabulary."""
    return path.rpartition(".")[2] in INPUTS


def head_of(path: str) -> bool:
    """Whether a module path is that of an output head over the vocabulary."""
    return path.rpartition(".")[2] in HEADS


def language_head(name: str) -> bool:
    """Whether a tensor belongs to the head of a language model, causal or masked."""
    return head_of(name.removesuffix(".weight")) or name.partition(".")[0] in _HEAD_ROOTS


def task_head(path: str) -> bool:
    """Whether a module path lies in the head of a classifier."""
    return not _TASK_HEADS.isdisjoint(path.split("."))


def is_tied(config: Json, *, head_stored: bool) -> bool | None:
    """Whether input and output embedding of a causal language model are one tensor.

    Where the config does not say, a missing head does: transformers leaves it out of the file when
    they are. None where both are stored, since the flag's default depends on the model, and where
    the class is not known either. A model without such a head is not tied, whatever its config
    says.
    """
    names = _architectures(config)
    if names and all(_HEADLESS.search(name) for name in names):
        return False
    declared = _declared_tied(config)
    if declared is not None or head_stored:
        return declared
    if True in _tie_flags(config):
        return True
    return any(name.endswith(_HEADED) for name in names) if names else None


def ties_masked_head(config: Json) -> bool:
    """Whether the output side of a masked language model shares the embedding's weight."""
    masked = any(name.endswith(_MASKED) for name in _architectures(config))
    return masked and _declared_tied(config) is not False


def _architectures(config: Json) -> list[str]:
    names = config.get("architectures")
    return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []


def _tie_flags(config: Json) -> list[object]:
    parts = (config, *(config[key] for key in text_configs(config)))
    return [part.get("tie_word_embeddings") for part in parts]


def _declared_tied(config: Json) -> bool | None:
    """What the config says; None where its parts are silent, or contradict each other."""
    flags = _tie_flags(config)
    if True in flags:
        return None if False in flags else True
    return None if None in flags else False
