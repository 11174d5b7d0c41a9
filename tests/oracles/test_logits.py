from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)

from dora_convert import api
from dora_convert.errors import MismatchError

from .models import (
    FIXTURES,
    MAKER,
    TOLERANCE,
    Convolutions,
    Trained,
    check,
    distance,
    load,
    merged,
    outputs,
    pixels,
    quiet,
    tokens,
    train,
)

LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}

CASES = {
    "llama_qv": AutoModelForCausalLM,
    "llama_all_sharded": AutoModelForCausalLM,
    "llama_patterns_rslora": AutoModelForCausalLM,
    "llama_save_bias": AutoModelForCausalLM,
    "llama_tokens": AutoModelForCausalLM,
    "llama_embed_head": AutoModelForCausalLM,
    "llama_tied": AutoModelForCausalLM,
    "gpt2_conv1d": AutoModelForCausalLM,
    "bert_bias_all": AutoModel,
    "resnet_conv2d": AutoModelForImageClassification,
}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", CASES)
def test_fixtures(name: str, tmp_path: Path) -> None:
    folder, cls = FIXTURES / "peft" / name, CASES[name]
    with quiet():
        base = load(folder / "base", cls)
        inputs = pixels() if name == "resnet_conv2d" else tokens()
        plain = outputs(base, inputs)
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
        expected = outputs(adapted, inputs)
    assert distance(plain, expected) > 0.05
    check(Trained(folder / "base", folder / "adapter", inputs, expected), tmp_path / "out", cls)


# Names of a base that was saved without its head, and of weights without prefix


def test_gpt2_from_a_base_without_prefix(tmp_path: Path) -> None:
    model = MAKER.gpt2(5)
    base = tmp_path / "hub"
    with quiet():
        model.transformer.save_pretrained(base)
    config = config_of(base) | {"architectures": ["GPT2LMHeadModel"]}
    (base / "config.json").write_text(json.dumps(config))
    assert "h.0.attn.c_attn.weight" in stored(base)
    lora = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    trained = train(tmp_path, model, tokens(), base=base, **lora)
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert stored(tmp_path / "out").keys() == stored(base).keys()


def test_gpt2_without_prefix_gets_a_head_of_its_own(tmp_path: Path) -> None:
    model = MAKER.gpt2(5)
    base = tmp_path / "hub"
    with quiet():
        model.transformer.save_pretrained(base)
    config = config_of(base) | {"architectures": ["GPT2LMHeadModel"]}
    (base / "config.json").write_text(json.dumps(config))
    trained = train(tmp_path, model, tokens(), base=base, target_modules=["wte"])
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert stored(tmp_path / "out").keys() - stored(base).keys() == {"lm_head.weight"}


def test_square_conv1d_alone(tmp_path: Path) -> None:
    """No shape gives away that it is stored [in, out]."""
    trained = train(tmp_path, MAKER.gpt2(6), tokens(), target_modules=["attn.c_proj"])
    check(trained, tmp_path / "out", AutoModelForCausalLM)


# Embeddings and heads


def test_tied_input_embedding_alone(tmp_path: Path) -> None:
    model = MAKER.llama(7, tied=True)
    trained = train(tmp_path, model, tokens(), target_modules=["embed_tokens", "q_proj"])
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_tied_head_alone(tmp_path: Path) -> None:
    model = MAKER.llama(7, tied=True)
    trained = train(tmp_path, model, tokens(), target_modules=["lm_head", "q_proj"])
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_tied_end_trained_whole(module: str, tmp_path: Path) -> None:
    model = MAKER.llama(8, tied=True)
    trained = train(tmp_path, model, tokens(), modules_to_save=[module], **LORA)
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_ends_trained_as_one(modules: list[str], tmp_path: Path) -> None:
    model = MAKER.llama(9, tied=True)
    lora = {"modules_to_save": modules, "ensure_weight_tying": True}
    trained = train(tmp_path, model, tokens(), **lora, **LORA)
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in stored(tmp_path / "out")


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_ends_adapted_with_weight_tying(modules: list[str], tmp_path: Path) -> None:
    """The two magnitudes still differ: DoRA cannot stay tied."""
    model = MAKER.llama(10, tied=True)
    lora = {"target_modules": [*modules, "q_proj"], "ensure_weight_tying": True}
    trained = train(tmp_path, model, tokens(), **lora)
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [False, True])
def test_trained_token_rows(tied: bool, tmp_path: Path) -> None:
    model = MAKER.llama(11, tied=tied)
    trained = train(tmp_path, model, tokens(), trainable_token_indices=[40, 2, 95], **LORA)
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is tied


def grown(model: PreTrainedModel) -> None:
    model.resize_token_embeddings(103)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [96, 102, 5]},
        {"trainable_token_indices": [6, 5]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ],
    ids=["resized", "saved", "new tokens", "old tokens", "adapted"],
)
def test_resized_vocabulary(lora: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = MAKER.llama(12, tied=tied)
    trained = train(tmp_path, model, tokens(103), prepare=grown, **(LORA | lora))
    check(trained, tmp_path / "out", AutoModelForCausalLM)
    assert config_of(tmp_path / "out")["vocab_size"] == 103


def test_resized_input_of_a_tied_model(tmp_path: Path) -> None:
    """The head is the larger shared weight as it was, of which the file holds a copy."""
    model = MAKER.llama(12, tied=True)
    lora = {"target_modules": ["embed_tokens", "q_proj"]}
    trained = train(tmp_path, model, tokens(103), prepare=grown, **lora)
    check(trained, tmp_path / "out", AutoModelForCausalLM)


def test_resized_vocabulary_with_a_head_that_was_not_saved(tmp_path: Path) -> None:
    """PEFT leaves the larger head out of the file: what it was cannot be known."""
    model = MAKER.llama(12)
    trained = train(
        tmp_path, model, tokens(103), prepare=grown, target_modules=["embed_tokens", "q_proj"]
    )
    with pytest.raises(MismatchError) as caught:
        api.merge(trained.adapter, tmp_path / "out", base=trained.base)
    assert any("103" in problem and "96" in problem for problem in caught.value.problems)


# Classifiers on bases without a head for them


@pytest.mark.parametrize("tied", [False, True])
def test_sequence_classifier_on_a_causal_base(tied: bool, tmp_path: Path) -> None:
    causal = MAKER.llama(13, tied=tied)
    base = tmp_path / "base"
    causal.save_pretrained(base)
    with quiet():
        model = LlamaForSequenceClassification.from_pretrained(base, num_labels=5, pad_token_id=0)
    trained = train(tmp_path, model, tokens(), base=base, task_type="SEQ_CLS", **LORA)
    model = merged(trained, tmp_path / "out", AutoModelForSequenceClassification)
    model.config.pad_token_id = 0
    assert distance(outputs(model, trained.inputs), trained.outputs) < TOLERANCE
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == len(config["label2id"]) == 5
    assert model.num_labels == 5


BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 96,
}


@pytest.mark.parametrize("labels", [2, 4])
def test_sequence_classifier_on_an_encoder(labels: int, tmp_path: Path) -> None:
    torch.manual_seed(14)
    base = tmp_path / "base"
    BertModel(BertConfig(**BERT)).save_pretrained(base)
    with quiet():
        model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
    lora = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    trained = train(tmp_path, model, tokens(), base=base, **lora)
    check(trained, tmp_path / "out", AutoModelForSequenceClassification)
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_token_classifier(tmp_path: Path) -> None:
    torch.manual_seed(15)
    base = tmp_path / "base"
    BertModel(BertConfig(**BERT), add_pooling_layer=False).save_pretrained(base)
    with quiet():
        model = AutoModelForTokenClassification.from_pretrained(base, num_labels=7)
    lora = {"target_modules": ["query", "value"], "task_type": "TOKEN_CLS", "bias": "all"}
    trained = train(tmp_path, model, tokens(), base=base, **lora)
    check(trained, tmp_path / "out", AutoModelForTokenClassification)


@pytest.mark.parametrize("cls", [DistilBertModel, DistilBertForMaskedLM])
def test_classifier_with_two_layers_of_its_own(cls: Any, tmp_path: Path) -> None:
    """DistilBERT: PEFT's `classifier` also means `pre_classifier`, which says no label count."""
    torch.manual_seed(16)
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=40, vocab_size=96)
    base = tmp_path / "base"
    cls(config).save_pretrained(base)
    with quiet():
        model = DistilBertForSequenceClassification.from_pretrained(base, num_labels=3)
    lora = {"target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS"}
    trained = train(tmp_path, model, tokens(), base=base, **lora)
    check(trained, tmp_path / "out", AutoModelForSequenceClassification)


def test_raw_dump_of_a_classifier_with_inner_layers(tmp_path: Path) -> None:
    """As FSDP leaves it: the adapter's name in every key, and the head wrapped."""
    torch.manual_seed(23)
    base = tmp_path / "base"
    RobertaModel(RobertaConfig(**BERT, pad_token_id=1), add_pooling_layer=False).save_pretrained(
        base
    )
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
        model.eval()
        lora = LoraConfig(
            r=4, use_dora=True, target_modules=["query", "value"], task_type="SEQ_CLS"
        )
        adapted = get_peft_model(model, lora).eval()
        MAKER.stir(adapted, torch.Generator().manual_seed(23))
        adapted.save_pretrained(tmp_path / "adapter")
        expected = outputs(adapted, tokens())
    marks = ("lora_", "modules_to_save", "original_module")
    raw = {n: t for n, t in adapted.state_dict().items() if any(mark in n for mark in marks)}
    assert "base_model.model.classifier.modules_to_save.default.out_proj.weight" in raw
    assert "base_model.model.classifier.original_module.dense.weight" in raw
    save_file(raw, tmp_path / "adapter" / "adapter_model.safetensors")
    trained = Trained(base, tmp_path / "adapter", tokens(), expected)
    check(trained, tmp_path / "out", AutoModelForSequenceClassification)


def test_classifier_with_another_number_of_labels(tmp_path: Path) -> None:
    """The base is a classifier already; the adapter brings a head of another size."""
    torch.manual_seed(17)
    base = tmp_path / "base"
    BertForSequenceClassification(BertConfig(**BERT, num_labels=6)).save_pretrained(base)
    with quiet():
        model = BertForSequenceClassification.from_pretrained(
            base, num_labels=3, ignore_mismatched_sizes=True
        )
    lora = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    trained = train(tmp_path, model, tokens(), base=base, **lora)
    check(trained, tmp_path / "out", AutoModelForSequenceClassification)


# Other layers and other names


def test_plain_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(18)
    model = Convolutions().eval()
    base = tmp_path / "base"
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    targets = ["one", "one_by_one", "three", "square"]
    with quiet():
        adapted = get_peft_model(
            model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=True)
        ).eval()
        MAKER.stir(adapted, torch.Generator().manual_seed(18))
        MAKER.save_adapter(adapted, tmp_path / "adapter")
    inputs = {"signal": torch.randn(2, 3, 9), "volume": torch.randn(2, 2, 3, 4, 5)}
    trained = Trained(base, tmp_path / "adapter", inputs, outputs(adapted, inputs))
    api.merge(trained.adapter, tmp_path / "out", base=base, how=api.MergeOptions(samples=None))
    fresh = Convolutions().eval()
    fresh.load_state_dict(stored(tmp_path / "out"))
    assert distance(outputs(fresh, inputs), trained.outputs) < TOLERANCE


def test_negative_magnitudes(tmp_path: Path) -> None:
    def flip(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            if "lora_magnitude_vector" in name:
                p[::3] *= -1

    trained = train(tmp_path, MAKER.llama(19), tokens(), change=flip, **LORA)
    check(trained, tmp_path / "out", AutoModelForCausalLM)


def test_vit_with_other_names_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(20)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    lora = {
        "target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"],
        "modules_to_save": ["classifier"],
    }
    trained = train(tmp_path, ViTForImageClassification(config), pixels(), **lora)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in stored(trained.base)
    check(trained, tmp_path / "out", AutoModelForImageClassification)
    assert stored(tmp_path / "out").keys() == stored(trained.base).keys()


TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def test_llava(tmp_path: Path) -> None:
    torch.manual_seed(21)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=95
    )
    model = LlavaForConditionalGeneration(config)
    inputs = tokens(95) | pixels(size=16)
    inputs["input_ids"][:2, :4] = 95  # two images of four patches
    lora = {"target_modules": ["q_proj", "v_proj", "down_proj", "fc1", "linear_1", "lm_head"]}
    trained = train(tmp_path, model, inputs, **lora)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in stored(trained.base)
    check(trained, tmp_path / "out", AutoModelForImageTextToText)
    assert stored(tmp_path / "out").keys() == stored(trained.base).keys()


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_vl(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(22)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        tie_word_embeddings=tied,
    )
    lora = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    trained = train(tmp_path, Qwen2VLForConditionalGeneration(config), tokens(), **lora)
    check(trained, tmp_path / "out", AutoModelForImageTextToText)
