"""What a stack gets: names, shapes, zero pairs, targets; and what it cannot get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from dora_convert.core.adapter import Adapter, LayerKind, MagnitudeAxis, TokenRows
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.lora import LoraLayer
from dora_convert.core.plan import WrittenFile
from dora_convert.core.tensors import DType
from dora_convert.loras import loras
from dora_convert.planning.lora import (
    Lora,
    affordable_rank,
    copy_problems,
    factor_shapes,
    lora_layers,
    stack_problems,
    targets,
)
from dora_convert.planning.planner import plan_merge
from dora_convert.planning.stacks import RANKS, STACKS, WITHOUT_LORA, Stack, reading
from tests.core.values import adapter, checkpoint, dora, magnitude_only, ref

LINEARS = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}


def llama(layers: int = 3, *, without: tuple[str, ...] = (), prefix: str = "model.") -> Checkpoint:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (20, 8),
        "lm_head.weight": (20, 8),
    }
    for i in range(layers):
        shapes |= {f"{prefix}layers.{i}.{n}.weight": s for n, s in LINEARS.items()}
        shapes[f"{prefix}layers.{i}.input_layernorm.weight"] = (8,)
    shapes = {name: s for name, s in shapes.items() if name.removesuffix(".weight") not in without}
    return checkpoint(shapes, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def made(
    trained: Adapter, base: Checkpoint, stack: str = "any", **options: Any
) -> dict[str, LoraLayer]:
    proposal = plan_merge(trained, base, **options)
    assert not proposal.problems
    layers = lora_layers(trained, base, proposal, STACKS[stack])
    assert [layer.path for layer in layers] == sorted(layer.path for layer in layers)
    return {layer.path: layer for layer in layers}


def config_of(trained: Adapter, base: Checkpoint, stack: str = "any", **ranks: int) -> Any:
    layers = list(made(trained, base, stack).values())
    names = plan_merge(trained, base).names
    found = {layer.path: 8 for layer in layers} | {
        k.replace("__", "."): r for k, r in ranks.items()
    }
    lora = Lora(trained, base.config, names, layers, found, DType.F32)
    (document,) = loras.get("peft").lay_out(lora).documents
    assert isinstance(document, WrittenFile)
    return json.loads(document.text)


def test_layers_and_siblings_that_were_not_adapted_get_zeros() -> None:
    trained = adapter(dora("model.layers.1.self_attn.q_proj", 8, 8))
    layers = made(trained, llama())
    names = {f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qkv"}
    assert layers.keys() == names
    assert [path for path, layer in layers.items() if not layer.empty] == list(trained.modules)
    assert layers["model.layers.2.self_attn.k_proj"].shape == (4, 8)
    assert layers["model.layers.1.self_attn.q_proj"].shape == (8, 8)
    for stack in ("vllm", "peft", "llama.cpp"):
        assert made(trained, llama(), stack).keys() == trained.modules.keys()


def test_zeros_of_other_groups() -> None:
    trained = adapter(
        dora("model.layers.0.mlp.up_proj", 12, 8), dora("model.layers.2.mlp.down_proj", 8, 12)
    )
    layers = made(trained, llama())
    leaves = {path.rpartition(".")[2] for path in layers}
    assert leaves == {"gate_proj", "up_proj", "down_proj"}
    assert len(layers) == 9


def test_zeros_where_some_layers_have_no_such_module() -> None:
    """Hybrid models: attention only in some layers, and not in the first."""
    without = tuple(f"model.layers.{i}.self_attn.{n}" for i in (0, 2) for n in ("q_proj", "v_proj"))
    trained = adapter(dora("model.layers.1.self_attn.q_proj", 8, 8))
    layers = made(trained, llama(5, without=without))
    assert sorted(path for path in layers if "q_proj" in path) == [
        f"model.layers.{i}.self_attn.q_proj" for i in (1, 3, 4)
    ]
    assert sum("k_proj" in path for path in layers) == 5


@pytest.mark.parametrize(
    ("disk", "path"),
    [("model.", "layers.0.self_attn.v_proj"), ("", "model.layers.0.self_attn.v_proj")],
)
def test_zeros_with_a_prefix_added_or_stripped(disk: str, path: str) -> None:
    trained = adapter(dora(path, 4, 8))
    layers = made(trained, llama(2, prefix=disk))
    start = path.partition("layers")[0]
    assert layers.keys() == {
        f"{start}layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkv"
    }
    assert config_of(trained, llama(2, prefix=disk))["target_modules"] == [
        "k_proj", "q_proj", "v_proj",
    ]  # fmt: skip


def test_no_zeros_for_a_lone_module() -> None:
    trained = adapter(dora("score", 5, 8))
    assert list(made(trained, checkpoint({"score.weight": (5, 8), "key.weight": (3, 3)}))) == [
        "score"
    ]


def test_transposed_layers() -> None:
    shapes = {f"h.{i}.attn.c_attn.weight": (8, 24) for i in range(2)}
    base = checkpoint(shapes, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    trained = adapter(dora("transformer.h.0.attn.c_attn", 24, 8))
    layers = made(trained, base)
    assert {p: (x.shape, x.flipped, x.empty) for p, x in layers.items()} == {
        "transformer.h.0.attn.c_attn": ((24, 8), True, False),
        "transformer.h.1.attn.c_attn": ((24, 8), True, True),
    }
    config = config_of(trained, base)
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["c_attn"]
    other = adapter(dora("x", 24, 8))
    assert made(other, checkpoint({"x.weight": (8, 24)}), transposed=["x"])["x"].flipped


def test_parts_of_a_module_in_the_order_of_its_rows() -> None:
    module = dora("x", 10, 4)
    proposal = plan_merge(adapter(module, magnitude_only("y", 6)), checkpoint(
        {"x.weight": (10, 4), "y.weight": (6, 3), "z.weight": (2, 2)}
    ))  # fmt: skip
    found = targets(proposal.plan)
    assert found.keys() == {"x", "y"}
    assert [(p.start, p.stop) for _, p in found["x"]] == [(0, 10)]


# What PEFT is told to adapt


BERT = {
    f"encoder.layer.{i}.{name}.weight": shape
    for i in range(2)
    for name, shape in {
        "attention.self.query": (8, 8),
        "attention.self.key": (8, 8),
        "attention.output.dense": (8, 8),
        "attention.output.LayerNorm": (8,),
        "intermediate.dense": (12, 8),
        "output.dense": (8, 12),
    }.items()
} | {"pooler.dense.weight": (8, 8), "embeddings.word_embeddings.weight": (20, 8)}


def matched(config: Mapping[str, Any], base: Checkpoint) -> set[str]:
    """What PEFT's rule makes of a list of targets: whole names, or ends after a dot."""
    paths = {name.removesuffix(".weight") for name in base.tensors}
    return {
        path
        for path in paths
        for end in config["target_modules"]
        if path == end or path.endswith(f".{end}")
    }


@pytest.mark.parametrize(
    "leaves",
    [
        ["attention.self.query"],
        ["attention.output.dense"],
        ["output.dense"],
        ["intermediate.dense", "output.dense", "attention.output.dense"],
        ["attention.self.query", "intermediate.dense"],
    ],
)
@pytest.mark.parametrize("layers", [[0, 1], [1]])
@pytest.mark.parametrize("stack", ["peft", "any"])
def test_targets_are_the_modules_and_no_others(
    leaves: list[str], layers: list[int], stack: str
) -> None:
    base = checkpoint(BERT, {"model_type": "bert", "architectures": ["BertModel"]})
    paths = [f"encoder.layer.{i}.{leaf}" for i in layers for leaf in leaves]
    trained = adapter(*(dora(p, *BERT[f"{p}.weight"]) for p in paths))
    assert matched(config_of(trained, base, stack), base) == set(made(trained, base, stack))


def test_targets_are_as_short_as_can_be() -> None:
    base = checkpoint(BERT, {"model_type": "bert", "architectures": ["BertModel"]})
    paths = [
        f"encoder.layer.{i}.{n}"
        for i in range(2)
        for n in ("output.dense", "attention.output.dense")
    ]
    trained = adapter(*(dora(p, *BERT[f"{p}.weight"]) for p in paths))
    assert config_of(trained, base)["target_modules"] == ["output.dense"]
    with_pooler = adapter(*trained.modules.values(), dora("pooler.dense", 8, 8))
    assert config_of(with_pooler, base)["target_modules"] == ["output.dense", "pooler.dense"]


def test_a_target_that_ends_like_a_container() -> None:
    base = checkpoint({"a.proj.weight": (4, 4), "b.proj.inner.weight": (4, 4)})
    assert config_of(adapter(dora("a.proj", 4, 4)), base)["target_modules"] == ["a.proj"]


def test_a_target_whose_every_end_is_anothers() -> None:
    base = checkpoint({"proj.weight": (4, 4), "a.proj.weight": (4, 4)})
    assert config_of(adapter(dora("proj", 4, 4)), base)["target_modules"] == ["proj"]


def test_config() -> None:
    trained = adapter(
        *(dora(f"model.layers.{i}.self_attn.o_proj", 8, 8) for i in range(3)),
        task="CAUSAL_LM",
        base_model="someone/model",
    )
    config = config_of(trained, llama())
    assert config["r"] == config["lora_alpha"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "someone/model"
    assert config["target_modules"] == ["o_proj"]
    assert config["bias"] == "none"
    for switch in ("use_dora", "use_rslora", "fan_in_fan_out"):
        assert config[switch] is False
    compact = config_of(trained, llama(), model__layers__1__self_attn__o_proj=3)
    assert (
        compact["rank_pattern"]
        == compact["alpha_pattern"]
        == {"model.layers.1.self_attn.o_proj": 3}
    )


# Stored tensors


@pytest.mark.parametrize(
    ("layer", "down", "up"),
    [
        (LoraLayer("p", LayerKind.LINEAR, (5, 7)), (8, 7), (5, 8)),
        (LoraLayer("p", LayerKind.EMBEDDING, (20, 6)), (8, 20), (6, 8)),
        (LoraLayer("p", LayerKind.CONVOLUTION, (5, 27), (3, 3)), (8, 3, 3, 3), (5, 8, 1, 1)),
    ],
    ids=["linear", "embedding", "convolution"],
)
def test_shapes(layer: LoraLayer, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    assert factor_shapes(layer, 8) == (down, up)


# What does not go


def embedding(path: str = "model.embed_tokens") -> Any:
    return replace(dora(path, 20, 8, axis=MagnitudeAxis.IN), kind=LayerKind.EMBEDDING)


@pytest.mark.parametrize("stack", STACKS)
def test_refusals(stack: str) -> None:
    known = STACKS[stack]
    base = llama()
    trained = adapter(
        dora("model.layers.0.fine", 8, 8),
        embedding(),
        dora("lm_head", 20, 8),
        replace(dora("conv", 8, 27), kind=LayerKind.CONVOLUTION),
    )
    problems = stack_problems(trained, base, known)
    assert any("embedding" in p for p in problems) != known.embeddings
    assert any("output head" in p for p in problems) != known.heads
    assert any("convolution" in p for p in problems) != known.convolutions
    assert not any("fine" in p for p in problems)
    saved = adapter(
        dora("model.layers.0.fine", 8, 8),
        replaced={"score.weight": ref("score.weight", 2, 8)},
        token_rows={"embed": TokenRows((1, 2), ref("rows", 2, 8))},
    )
    assert stack_problems(saved, base, known) == [
        "score.weight: trained whole, which a LoRA cannot carry",
        "embed (token rows): trained whole, which a LoRA cannot carry",
    ]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("flag", [True, None])
def test_ends_that_are_one_tensor(stack: str, flag: bool | None) -> None:
    """Only PEFT gives them separate updates; llama.cpp and mlx-lm have one module for both."""
    base = llama(without=("lm_head",))
    base = replace(
        base, config={**base.config, "tie_word_embeddings": flag} if flag else base.config
    )
    trained = adapter(embedding(), dora("lm_head", 20, 8))
    problems = stack_problems(trained, base, STACKS[stack])
    refused = [p for p in problems if p.startswith(("model.embed_tokens:", "lm_head:"))]
    assert len(refused) == (0 if stack == "peft" else 2)


def test_models_that_ollama_takes() -> None:
    ollama = STACKS["ollama"]
    trained = adapter(dora("model.layers.0.mlp.up_proj", 12, 8))
    for name, fine in (("LlamaForCausalLM", True), ("Qwen2ForCausalLM", False), (None, False)):
        base = replace(llama(), config={"architectures": [name]} if name else {})
        for form in ollama.forms:
            problems = stack_problems(trained, base, reading(ollama, form))
            assert (not problems) == (fine or form == "gguf")
            assert all("Gemma2ForCausalLM" in problem for problem in problems)


def test_modules_that_exllama_takes() -> None:
    trained = adapter(dora("model.layers.0.mlp.up_proj", 12, 8), dora("score", 2, 8))
    assert stack_problems(trained, llama(), STACKS["exllamav2"]) == [
        "score: not a part of model.layers.N"
    ]


def test_a_weight_that_was_resized() -> None:
    own = ref("copy", 24, 8)
    trained = adapter(
        replace(embedding("a"), weight=own), replace(embedding("b"), weight=own), dora("c", 8, 8)
    )
    weights = {"a": ref("a.weight", 20, 8), "b": ref("b.weight", 24, 8), "c": ref("c", 8, 8)}
    (problem,) = copy_problems(trained, weights)
    assert problem.startswith("a: trained on [24, 8], base [20, 8]")


@pytest.mark.parametrize(
    ("elements", "listed", "free"),
    [(29, 0, 0), (30, 0, 1), (239, 0, 7), (240, 8, 8), (1000, 32, 33), (10**6, 512, 33333)],
)
def test_the_rank_that_is_affordable(elements: int, listed: int, free: int) -> None:
    layers = [LoraLayer("a", LayerKind.LINEAR, (5, 7)), LoraLayer("b", LayerKind.LINEAR, (8, 10))]
    assert affordable_rank(layers, Stack("some"), elements) == listed
    assert affordable_rank(layers, Stack("some", ranks=None), elements) == free


def test_the_common_stack_asks_for_all_that_any_other_does() -> None:
    common = STACKS["any"]
    for name, stack in STACKS.items():
        assert stack.ranks in (None, RANKS)
        assert common.advised <= stack.advised
        assert common.complete >= stack.complete
        for able in ("patterns", "embeddings", "heads", "tied", "convolutions"):
            assert getattr(common, able) <= getattr(stack, able), name
        assert set(stack.forms) <= set(loras.names())
    assert not STACKS.keys() & WITHOUT_LORA.keys()
