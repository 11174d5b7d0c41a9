from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dora_convert.core.adapter import Adapter, BiasRule, MagnitudeAxis
from dora_convert.core.bundle import Bundle
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError
from dora_convert.formats import detect, formats
from dora_convert.formats.megatron import FORMAT
from dora_convert.storage.bundle import open_bundle

from ..core.values import NOWHERE, adapter, dora, ref, refs

FIXTURE = Path(__file__).parents[2] / "fixtures" / "megatron" / "adapter"
RECIPE = {"dim": 4, "alpha": 12, "tensor_model_parallel_size": 1}
# Six query heads of four rows; each of two key and value heads serves three.
BASE: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_size": 16,
    "intermediate_size": 20,
}
QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
SHAPES = {QKV: (40, 16), PROJ: (16, 24), FC1: (40, 16), FC2: (16, 20)}


def layer(inner: str, *shape: int, number: int = 0, prefix: str = "") -> dict[str, TensorRef]:
    out, width = shape or SHAPES[inner]
    name = f"{prefix}decoder.layers.{number}.{inner}.adapter"
    return refs(
        {
            f"{name}.linear_in.weight": (4, width),
            f"{name}.linear_out.weight": (out, 4),
            f"{name}.weight_magnitude": (out,),
        }
    )


def read(
    tensors: Mapping[str, TensorRef],
    recipe: Mapping[str, Any] | None = RECIPE,
    base: Mapping[str, Any] | None = BASE,
    axis: MagnitudeAxis | None = None,
) -> Adapter:
    held = {"adapter_config.json": recipe, "config.json": base}
    documents = {name: document for name, document in held.items() if document is not None}
    return FORMAT.read(Bundle(NOWHERE, tensors, documents), axis=axis)


def problems(*args: Any, **others: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(*args, **others)
    return list(caught.value.problems)


def test_it_is_recognised() -> None:
    held = open_bundle(FIXTURE)
    assert [name for name in formats.names() if formats.get(name).detect(held)] == ["megatron"]
    assert detect(held) == "megatron"


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (
            QKV,
            {
                "self_attn.q_proj": (24, 16),
                "self_attn.k_proj": (8, 16),
                "self_attn.v_proj": (8, 16),
            },
        ),
        (PROJ, {"self_attn.o_proj": (16, 24)}),
        (FC1, {"mlp.gate_proj": (20, 16), "mlp.up_proj": (20, 16)}),
        (FC2, {"mlp.down_proj": (16, 20)}),
    ],
)
def test_layers(inner: str, expected: dict[str, tuple[int, int]], prefix: str) -> None:
    modules = read(layer(inner, number=11, prefix=prefix)).modules
    found = {}
    for path, module in modules.items():
        assert module.delta is not None
        assert module.magnitude is not None
        assert module.magnitude.spec.shape == (module.delta.shape[0],)
        assert module.scaling == 3.0
        rule = BiasRule.SCALED if inner == QKV else BiasRule.KEEP
        assert module.bias_rule is rule
        found[path] = module.delta.shape
    assert found == {f"model.layers.11.{name}": shape for name, shape in expected.items()}


def test_feed_forward_without_a_gate() -> None:
    assert list(read(layer(FC1, 20, 16)).modules) == ["model.layers.0.mlp.up_proj"]


def test_heads_of_a_config_that_says_less() -> None:
    base = {"num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 20}
    modules = read(layer(QKV, 48, 16), base=base).modules
    assert [m.delta.shape for m in modules.values() if m.delta] == [(16, 16)] * 3


@pytest.mark.parametrize("part", ["linear_in.weight", "linear_out.weight", "weight_magnitude"])
def test_a_part_is_missing(part: str) -> None:
    tensors = {name: t for name, t in layer(PROJ).items() if not name.endswith(part)}
    assert problems(tensors) == [f"decoder.layers.0.{PROJ}: {part} is missing"]


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_in.weight",
        "decoder.layers.0.self_attention.linear_qkv.to_wrap.weight",
        "decoder.layers.x.mlp.linear_fc1.adapter.linear_in.weight",
        "decoder.final_layernorm.weight",
    ],
)
def test_what_is_not_understood(name: str) -> None:
    assert problems(layer(PROJ) | {name: ref(name, 3)}) == [f"{name} [3] is not understood"]


def test_wrong_tensors() -> None:
    name = f"decoder.layers.0.{PROJ}"
    up = f"{name}.adapter.linear_out.weight"
    assert "ranks disagree" in problems(layer(PROJ) | {up: ref(up, 16, 3)})[0]
    m = f"{name}.adapter.weight_magnitude"
    assert problems(layer(PROJ) | {m: ref(m, 15)}) == [
        f"{name}: the magnitude has 15 entries, expected 16"
    ]


def test_twice() -> None:
    tensors = layer(PROJ) | layer(PROJ, prefix="module.")
    assert len([p for p in problems(tensors) if "the same part" in p]) == 3


def test_nothing_in_it() -> None:
    assert problems({}) == ["the file holds no DoRA module"]


@pytest.mark.parametrize("key", RECIPE)
def test_the_recipe_is_needed(key: str) -> None:
    recipe = {k: v for k, v in RECIPE.items() if k != key}
    assert any(f"{key!r} is missing" in p for p in problems(layer(PROJ), recipe))
    assert any(f"{key!r}" in p for p in problems(layer(PROJ), {**RECIPE, key: "x"}))


def test_no_documents() -> None:
    told = problems(layer(PROJ), None, None)
    assert any("adapter_config.json is missing" in p for p in told)
    assert any("config.json is missing: put the base" in p for p in told)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_attention_heads": None},
        {"num_attention_heads": 5},
        {"hidden_size": None},
        {"intermediate_size": 0},
        {"num_attention_heads": True},
    ],
)
def test_base_config_that_does_not_say(wrong: dict[str, Any]) -> None:
    told = problems(layer(PROJ), base={**BASE, **wrong})
    assert any("needed to tell apart" in p for p in told)


def test_rank() -> None:
    assert "says dim 8, the tensors have rank 4" in problems(layer(PROJ), {**RECIPE, "dim": 8})[0]


@pytest.mark.parametrize(
    ("inner", "shape"),
    [(QKV, (20, 16)), (PROJ, (16, 12)), (FC2, (16, 10)), (QKV, (10, 16))],
)
def test_shards_of_tensor_parallel_training(inner: str, shape: tuple[int, int]) -> None:
    (told,) = problems(layer(inner, *shape))
    assert "tensor-parallel shards, to be gathered" in told


def test_gated_attention() -> None:
    (told,) = problems(layer(QKV, 64, 16))
    assert "gated attention" in told
    for key in ("attention_output_gate", "attn_output_gate"):
        assert "gated attention" in problems(layer(QKV), base={**BASE, key: True})[0]


def test_other_shapes() -> None:
    assert problems(layer(QKV, 41, 16)) == [
        f"decoder.layers.0.{QKV}: [41, 16], the base has [40, 16]"
    ]


def test_local_norms_of_tensor_parallel_training() -> None:
    recipe = {**RECIPE, "tensor_model_parallel_size": 2}
    for inner in (PROJ, FC2):
        (told,) = problems(layer(inner), recipe)
        assert "the norm of whole rows was never known" in told
    assert read(layer(QKV) | layer(FC1), recipe).modules
    (told,) = problems(layer(FC1), {**RECIPE, "tensor_model_parallel_size": 3})
    assert "not shared out by 3" in told


def test_axis() -> None:
    assert read(layer(PROJ), axis=MagnitudeAxis.OUT).modules
    assert "one per output" in problems(layer(PROJ), axis=MagnitudeAxis.IN)[0]


def test_it_cannot_be_written() -> None:
    with pytest.raises(InputError, match="cannot be written") as caught:
        FORMAT.write(adapter(dora("model.layers.0.self_attn.q_proj", 6, 10)))
    assert "share one linear_in" in caught.value.problems[0]
