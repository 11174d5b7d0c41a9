"""The files beside the weights: carried over, or repaired where the merge made them untrue."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Checkpoint, Json, json_text
from dora_convert.core.plan import CarriedFile, Document, Shard, WrittenFile
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.planning.families import task_head, text_configs
from dora_convert.planning.pack import indexes
from dora_convert.planning.ties import Ties
from dora_convert.planning.vocabulary import vocabulary_ends

__all__ = ["documents", "repaired_config"]

_TORCH_NAMES = {
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.F32: "float32",
    DType.F64: "float64",
}
_TASK_SUFFIX = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_LABELS = re.compile(r"(^|\.)(score|classifier|out_proj)\.weight$")
_STEM = re.compile(r"^(.+?)(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$")


def documents(
    adapter: Adapter,
    checkpoint: Checkpoint,
    shards: Sequence[Shard],
    ties: Ties,
    *,
    dtype: DType | None = None,
    overrides: Mapping[str, Path] | None = None,
    quantization: Json | None = None,
) -> tuple[Document, ...]:
    """Every file of the output that is not a shard, sorted by name.

    `overrides` are the adapter's own tokenizer and processor files, where they differ;
    `quantization` the config's entries that say how the weights are stored.
    """
    found: dict[str, Document] = {
        name: CarriedFile(name, checkpoint.root / name) for name in checkpoint.files
    }
    found |= {name: CarriedFile(name, path) for name, path in (overrides or {}).items()}
    specs = [spec for shard in shards for spec in shard.specs]
    config = {
        **repaired_config(adapter, checkpoint, specs, ties, dtype=dtype),
        **(quantization or {}),
    }
    # A base that was given as one file carries nothing along, but has a config all the same; that
    # of one that was decoded says no longer what its file does.
    changed = config != checkpoint.config or checkpoint.schemes
    if config and (changed or "config.json" not in found):
        found["config.json"] = WrittenFile("config.json", json_text(config))
    found |= {name: WrittenFile(name, text) for name, text in indexes(shards).items()}
    return tuple(found[name] for name in sorted(found))


def repaired_config(
    adapter: Adapter,
    checkpoint: Checkpoint,
    specs: Iterable[TensorSpec],
    ties: Ties,
    *,
    dtype: DType | None = None,
) -> Json:
    """The base's config with what the merge changed: tie flag, vocabulary, dtype, head."""
    config: dict[str, Any] = copy.deepcopy(dict(checkpoint.config))
    if not config:
        return config
    parts = [config, *(config[key] for key in text_configs(config))]
    if ties.broken:
        config["tie_word_embeddings"] = False
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    specs = list(specs)
    _set_vocabulary(parts, checkpoint, specs)
    if dtype is not None:
        _set_dtype(config, _TORCH_NAMES[dtype])
    if adapter.task in _TASK_SUFFIX:
        _set_task(config, adapter.task or "", checkpoint, specs)
    return config


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """In every part of the model: a vision tower is cast as well."""
    for key, value in config.items():
        if isinstance(value, dict):
            _set_dtype(value, name)
        elif key in ("torch_dtype", "dtype") and isinstance(value, str):
            config[key] = name


def _set_vocabulary(
    parts: Sequence[dict[str, Any]], checkpoint: Checkpoint, specs: Iterable[TensorSpec]
) -> None:
    for spec in vocabulary_ends(specs):
        old = checkpoint.tensors.get(spec.name)
        if old is not None and old.spec.shape[:1] != spec.shape[:1]:
            for part in parts:
                if "vocab_size" in part:
                    part["vocab_size"] = spec.shape[0]


def _set_task(
    config: dict[str, Any], task: str, checkpoint: Checkpoint, specs: Sequence[TensorSpec]
) -> None:
    """The class with the head that the adapter trained, and its labels."""
    if not any(task_head(spec.name) for spec in specs):
        return
    suffix = _TASK_SUFFIX[task]
    names = config.get("architectures") or []
    stem = _STEM.match(names[0]) if names and isinstance(names[0], str) else None
    if stem is not None:
        config["architectures"] = [stem[1] + suffix]
    stored = checkpoint.tensors
    heads = [s for s in specs if s.name not in stored or s.shape != stored[s.name].spec.shape]
    counts = {s.shape[0] for s in heads if _LABELS.search(s.name)}
    if len(counts) == 1 and task != "QUESTION_ANS":
        labels = range(counts.pop())
        known = config.get("id2label")
        if isinstance(known, dict) and len(known) == len(labels):
            return
        config["id2label"] = {str(i): f"LABEL_{i}" for i in labels}
        config["label2id"] = {f"LABEL_{i}": i for i in labels}
