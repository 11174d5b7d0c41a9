from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.plan import CarriedFile, Document, WrittenFile
from dora_convert.core.tensors import DType
from dora_convert.planning.planner import plan_merge

from ..core.values import NOWHERE, adapter, checkpoint, dora, ref

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
    "vocab_size": 20,
    "dtype": "bfloat16",
}
Q = "model.layers.0.self_attn.q_proj"
PLAIN = adapter(dora(Q, 8, 8))


def base(config: dict[str, Any], **options: Any) -> Checkpoint:
    shapes = {
        "model.embed_tokens.weight": (20, 8),
        f"{Q}.weight": (8, 8),
        "lm_head.weight": (20, 8),
    }
    return checkpoint(shapes, config, **options)


def documents(found: Adapter, held: Checkpoint, **options: Any) -> dict[str, Document]:
    proposal = plan_merge(found, held, **options)
    assert proposal.problems == ()
    return {document.name: document for document in proposal.plan.documents}


def config(found: Adapter, before: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What is different afterwards."""
    document = documents(found, base(before), **options)["config.json"]
    if isinstance(document, CarriedFile):
        return {}
    after: dict[str, Any] = json.loads(document.text)
    assert before.keys() <= after.keys()
    return {key: value for key, value in after.items() if before.get(key) != value}


# Files


def test_files_are_carried_and_sorted() -> None:
    names = ("tokenizer.json", "config.json", "1_Pooling/config.json")
    found = documents(PLAIN, base(LLAMA, files=names))
    assert list(found) == sorted(names)
    assert all(found[n] == CarriedFile(n, NOWHERE / n) for n in names)


def test_own_files_of_the_adapter_go_first() -> None:
    mine = Path("adapter/tokenizer.json")
    held = base(LLAMA, files=("config.json", "tokenizer.json"))
    added = Path("adapter/chat_template.jinja")
    overrides = {"tokenizer.json": mine, "chat_template.jinja": added}
    found = documents(PLAIN, held, overrides=overrides)
    assert found["tokenizer.json"] == CarriedFile("tokenizer.json", mine)
    assert found["chat_template.jinja"] == CarriedFile("chat_template.jinja", added)


def test_a_config_that_stays_true_is_carried() -> None:
    """Byte for byte: what this tool would write has another layout."""
    assert isinstance(documents(PLAIN, base(LLAMA))["config.json"], CarriedFile)


def test_no_config_stays_none() -> None:
    assert documents(PLAIN, base({}, files=()), dtype=DType.F16) == {}


def test_text_in_any_language() -> None:
    before = LLAMA | {"name": "モデル", "dtype": "float32"}
    document = documents(PLAIN, base(before), dtype=DType.F16)["config.json"]
    assert isinstance(document, WrittenFile)
    assert "モデル" in document.text
    assert document.text.endswith("}\n")


# Element type


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(DType.F16, "float16"), (DType.F32, "float32"), (DType.F64, "float64")],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_element_type(dtype: DType, name: str, key: str) -> None:
    before = {**LLAMA, key: "bfloat16"}
    assert config(PLAIN, before, dtype=dtype)[key] == name
    assert config(PLAIN, before, dtype=DType.BF16) == {}


def test_element_type_of_every_part() -> None:
    before = LLAMA | {
        "text_config": {"dtype": "bfloat16", "hidden_size": 8},
        "vision_config": {"torch_dtype": "bfloat16", "dtype": None},
    }
    found = config(PLAIN, before, dtype=DType.F16)
    assert found == {
        "dtype": "float16",
        "text_config": {"dtype": "float16", "hidden_size": 8},
        "vision_config": {"torch_dtype": "float16", "dtype": None},
    }


def test_the_base_config_itself_is_not_touched() -> None:
    held = base(LLAMA | {"text_config": {"dtype": "bfloat16"}})
    documents(PLAIN, held, dtype=DType.F16)
    assert held.config["text_config"] == {"dtype": "bfloat16"}


# Ties and vocabulary


def resized(rows: int) -> Adapter:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return adapter(dora(Q, 8, 8), replaced={n: ref(f"new.{n}", rows, 8) for n in names})


def test_vocabulary() -> None:
    assert config(resized(23), LLAMA) == {"vocab_size": 23}
    assert config(resized(20), LLAMA) == {}


def test_vocabulary_of_a_multimodal_model() -> None:
    before = {k: v for k, v in LLAMA.items() if k != "vocab_size"}
    before["text_config"] = {"vocab_size": 20, "tie_word_embeddings": False}
    before["vision_config"] = {"vocab_size": 99}
    assert config(resized(23), before) == {
        "text_config": {"vocab_size": 23, "tie_word_embeddings": False}
    }


def test_tie_flag_wherever_it_stands() -> None:
    before = LLAMA | {"tie_word_embeddings": True}
    before["text_config"] = {"tie_word_embeddings": True}
    assert config(adapter(dora("lm_head", 20, 8)), before) == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False},
    }


def test_tie_flag_that_was_not_there() -> None:
    before = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}
    assert config(adapter(dora("lm_head", 20, 8)), before) == {"tie_word_embeddings": False}
    assert config(PLAIN, before) == {}


# Heads of other tasks


def classifier(rows: int, *names: str, task: str = "SEQ_CLS") -> Adapter:
    heads = {name: ref(name, rows, 8) for name in names}
    return adapter(dora(Q, 8, 8), replaced=heads, task=task)


LABELS = {
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
}


@pytest.mark.parametrize(
    "name", ["score.weight", "classifier.weight", "classifier.out_proj.weight"]
)
def test_sequence_classifier(name: str) -> None:
    assert config(classifier(3, name), LLAMA) == {
        "architectures": ["LlamaForSequenceClassification"],
        **LABELS,
    }


def test_classifier_loses_the_language_model_head() -> None:
    proposal = plan_merge(classifier(3, "score.weight"), base(LLAMA))
    assert [job.output.name for job in proposal.plan.jobs] == [
        "model.embed_tokens.weight",
        f"{Q}.weight",
        "score.weight",
    ]
    assert any("left out" in note for note in proposal.plan.notes)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_only_a_head_makes_a_classifier(task: str) -> None:
    """The task alone does not: the language model's head stays, changed or not."""
    trained = {"lm_head.weight": ref("h", 20, 8)}
    for found in (adapter(dora(Q, 8, 8), task=task), adapter(replaced=trained, task=task)):
        proposal = plan_merge(found, base(LLAMA))
        assert "lm_head.weight" in [job.output.name for job in proposal.plan.jobs]
        assert config(found, LLAMA) == {}


def test_heads_of_masked_language_models_go_too() -> None:
    shapes = {f"{Q}.weight": (8, 8), "cls.predictions.bias": (20,), "cls.seq.weight": (2, 8)}
    held = checkpoint(shapes, LLAMA | {"architectures": ["BertForPreTraining"]})
    proposal = plan_merge(classifier(3, "classifier.weight"), held)
    assert [job.output.name for job in proposal.plan.jobs] == [f"{Q}.weight", "classifier.weight"]


def test_layers_before_the_classifier_say_no_label_count() -> None:
    heads = {"classifier.weight": ref("c", 3, 8), "pre_classifier.weight": ref("p", 8, 8)}
    found = adapter(dora(Q, 8, 8), replaced=heads, task="SEQ_CLS")
    assert config(found, LLAMA)["id2label"] == LABELS["id2label"]


def test_labels_of_the_right_number_are_kept() -> None:
    named = {"id2label": {"0": "no", "1": "yes", "2": "?"}, "label2id": {"no": 0, "yes": 1, "?": 2}}
    assert config(classifier(3, "score.weight"), LLAMA | named) == {
        "architectures": ["LlamaForSequenceClassification"]
    }
    assert config(classifier(2, "score.weight"), LLAMA | named)["id2label"] == {
        "0": "LABEL_0",
        "1": "LABEL_1",
    }


@pytest.mark.parametrize(
    ("before", "task", "after"),
    [
        ("BertModel", "TOKEN_CLS", "BertForTokenClassification"),
        ("BertForMaskedLM", "SEQ_CLS", "BertForSequenceClassification"),
        ("GPT2LMHeadModel", "SEQ_CLS", "GPT2ForSequenceClassification"),
        ("GPT2DoubleHeadsModel", "TOKEN_CLS", "GPT2ForTokenClassification"),
        ("DebertaV2Model", "QUESTION_ANS", "DebertaV2ForQuestionAnswering"),
        ("XLMRobertaForSequenceClassification", "SEQ_CLS", "XLMRobertaForSequenceClassification"),
    ],
)
def test_class_of_the_model(before: str, task: str, after: str) -> None:
    name = "qa_outputs.weight" if task == "QUESTION_ANS" else "classifier.weight"
    found = config(classifier(2, name, task=task), LLAMA | {"architectures": [before]})
    assert found.get("architectures", [before]) == [after]
    assert ("id2label" in found) == (task != "QUESTION_ANS")


@pytest.mark.parametrize("names", [None, [], ["Odd"], [3], "LlamaModel"])
def test_class_that_is_not_understood_is_left(names: Any) -> None:
    found = config(classifier(3, "score.weight"), LLAMA | {"architectures": names})
    assert "architectures" not in found


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None, "OTHER"])
def test_other_tasks_change_nothing(task: str | None) -> None:
    assert config(adapter(dora(Q, 8, 8), task=task), LLAMA) == {}
