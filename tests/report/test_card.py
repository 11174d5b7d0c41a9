"""Cards, as the Hub's own parser reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from dora_convert.report.card import CardFacts, figures_of, has_section, is_bare, model_card

LORA = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}
MERGED = CardFacts(
    repo="me/merged",
    base_model="org/base",
    license={"license": "apache-2.0"},
    architecture="LlamaForCausalLM",
)
CASES = {
    "merged": (
        MERGED,
        {
            "base_model": "org/base",
            "base_model_relation": "finetune",
            "library_name": "transformers",
            "tags": ["dora-convert", "dora", "merged"],
            "license": "apache-2.0",
            "pipeline_tag": "text-generation",
        },
    ),
    "quantised": (
        CardFacts(repo="me/q", base_model="org/base", scheme="gptq", architecture="BertModel"),
        {
            "base_model": "org/base",
            "base_model_relation": "quantized",
            "library_name": "transformers",
            "tags": ["dora-convert", "dora", "merged", "gptq"],
        },
    ),
    "lora": (
        CardFacts(repo="me/lora", base_model="org/base", adapter=LORA),
        {
            "base_model": "org/base",
            "base_model_relation": "adapter",
            "library_name": "peft",
            "tags": ["dora-convert", "lora"],
        },
    ),
    "a LoRA for diffusers": (
        CardFacts(
            repo="me/d",
            base_model="org/base",
            adapter={},
            weights="pytorch_lora_weights.safetensors",
        ),
        {
            "base_model": "org/base",
            "base_model_relation": "adapter",
            "library_name": "diffusers",
            "tags": ["dora-convert", "lora"],
        },
    ),
    "another trainer's": (
        CardFacts(repo="me/mlx", base_model="org/base", adapter={"lora_parameters": {}}),
        {"base_model": "org/base", "base_model_relation": "adapter", "tags": ["dora-convert"]},
    ),
    "dora of an unknown base": (
        CardFacts(repo="me/dora", adapter={**LORA, "use_dora": True}),
        {"library_name": "peft", "tags": ["dora-convert", "dora"]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_metadata(name: str) -> None:
    facts, expected = CASES[name]
    card = ModelCard(model_card(facts))
    assert card.data.to_dict() == expected
    assert card.text.strip().startswith(f"# {facts.repo.split('/')[1]}\n")
    assert (f'"{facts.repo}"' in card.text) == ("library_name" in expected)


@pytest.mark.parametrize("name", CASES)
def test_a_card_made_from_itself_stays_as_it_is(name: str) -> None:
    facts, _ = CASES[name]
    first = model_card(facts)
    assert model_card(facts, first) == first


def test_a_licence_of_its_own_name() -> None:
    terms = {"license": "other", "license_name": "gem", "license_link": "https://x.org/a?b#c"}
    facts = CardFacts(repo="me/x", license=terms)
    data = ModelCard(model_card(facts)).data.to_dict()
    assert terms.items() <= data.items()
    data = ModelCard(model_card(facts, "---\nlicense: mit\n---\n")).data.to_dict()
    assert data["license"] == "mit"
    assert not {"license_name", "license_link"} & data.keys()


def test_what_a_lora_is() -> None:
    text = model_card(CASES["lora"][0])
    assert "| rank | 16 |" in text
    assert "| alpha | 32 |" in text
    assert "| modules | q_proj, v_proj |" in text
    assert "--lora-modules lora=me/lora" in text
    assert "--lora-modules" not in model_card(CASES["dora of an unknown base"][0])  # vLLM has none


def test_how_to_load_it() -> None:
    """In each program that reads the file, and in no other."""
    merged = model_card(MERGED)
    assert 'AutoModelForCausalLM.from_pretrained("me/merged")' in merged
    assert "$ vllm serve me/merged\n" in merged
    assert "$ hf download me/merged --local-dir merged\n$ convert_hf_to_gguf.py merged\n" in merged
    for dense_only in (replace(MERGED, scheme="gptq"), replace(MERGED, architecture="BertModel")):
        assert "gguf" not in model_card(dense_only)
    assert "$ convert_hf_to_gguf.py .\n" in model_card(replace(MERGED, repo="."))
    diffusers = model_card(CASES["a LoRA for diffusers"][0])
    assert 'pipeline.load_lora_weights("me/d")' in diffusers
    other = CASES["another trainer's"][0]
    mlx = model_card(replace(other, weights="adapters.safetensors"))
    assert "$ mlx_lm.generate --model org/base --adapter-path mlx\n" in mlx
    gguf = model_card(replace(other, repo=".", weights="lora.gguf"))
    assert "$ llama-cli -m BASE.gguf --lora ./lora.gguf\n" in gguf
    assert "```" not in model_card(replace(other, weights="weights.safetensors"))


OWN = """---
license: other
license_name: mine
language:
- de
# a comment
tags: [chat]
---
# My model

About it.
"""


def test_an_existing_card_is_kept() -> None:
    text = model_card(MERGED, OWN)
    head, body = OWN.removesuffix("\n").split("\n---\n")
    assert text.startswith(head + "\n")
    assert body in text
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "other"
    assert data["tags"] == ["chat"]
    assert data["base_model"] == "org/base"
    assert model_card(MERGED, text) == text


@pytest.mark.parametrize("own", ["# Title\n\nText", "Text\n\n---\n\nmore\n", ""])
def test_a_card_without_metadata(own: str) -> None:
    text = model_card(MERGED, own)
    assert ModelCard(text).data.base_model == "org/base"
    assert own.strip() in text


def test_the_part_of_ours_is_brought_up_to_date() -> None:
    old = model_card(MERGED, OWN) + "\nAfterwards.\n"
    new = model_card(CardFacts(repo="me/other", base_model="org/base"), old)
    assert "me/other" in new
    assert "me/merged" not in new
    assert "Afterwards." in new
    assert new.count("dora-convert: begin") == 1


@pytest.mark.parametrize(
    "value", ["1.0", "yes: no", 'a "b"', "null", "- x", "#x", "a\nb", "no", "On"]
)
def test_odd_values_stay_text(value: str) -> None:
    card = ModelCard(model_card(CardFacts(repo="me/x", base_model=value)))
    assert card.data.base_model == value


FIGURES = {"base": "org/base@0123abc", "modules merged": "224", "lost by rounding": "0.31% of it"}


@pytest.mark.parametrize("name", CASES)
def test_figures_are_read_back(name: str) -> None:
    facts = replace(CASES[name][0], figures=FIGURES)
    text = model_card(facts)
    assert FIGURES.items() <= figures_of(text).items()
    again = replace(facts, figures=figures_of(text))
    assert model_card(again, text) == text


def test_figures_cannot_break_the_table() -> None:
    text = model_card(replace(MERGED, figures={"a|b": "x\n| c | d |", "empty": ""}))
    assert figures_of(text) == {"a b": "x c d", "empty": "none"}
    assert figures_of("| no | section |") == {}


def test_a_card_that_waits_for_its_repository() -> None:
    """Made before a push; then it is as if it had been made for the repository at once."""
    local = model_card(CardFacts(figures=FIGURES, architecture="LlamaForCausalLM"))
    assert is_bare(local)
    assert 'from_pretrained(".")' in local
    pushed = model_card(replace(MERGED, figures=figures_of(local)), local)
    data = ModelCard(pushed).data.to_dict()
    assert data == CASES["merged"][1]
    assert "# merged\n" in pushed
    assert 'from_pretrained("me/merged")' in pushed
    assert figures_of(pushed) == FIGURES


def test_whose_words_they_are() -> None:
    local = model_card(CardFacts())
    assert not is_bare(local + "\nMore.\n")
    assert not is_bare(model_card(MERGED))
    assert not is_bare(OWN)
    assert has_section(local)
    assert has_section(model_card(MERGED, OWN))
    assert not has_section(OWN)
