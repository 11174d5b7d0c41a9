from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_convert.core.adapter import Adapter, BiasRule, MagnitudeAxis, RowOrder
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.errors import InputError
from dora_convert.formats import detect
from dora_convert.formats.peft import FORMAT as PEFT
from dora_convert.formats.torchtune import FORMAT
from dora_convert.storage.bundle import open_bundle

from ..core.values import bundle, dora, ref, refs

FIXTURES = Path(__file__).parents[2] / "fixtures" / "torchtune"
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": [], "peft_type": "LORA"}
Q, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"


def layer(name: str, out: int = 6, inner: int = 10, rank: int = 4) -> dict[str, TensorRef]:
    return refs(
        {
            f"{name}.magnitude": (out,),
            f"{name}.lora_a.weight": (rank, inner),
            f"{name}.lora_b.weight": (out, rank),
        }
    )


TENSORS = layer("layers.0.attn.q_proj") | layer("layers.0.mlp.w1", 14)


def read(tensors: Any = TENSORS, config: Mapping[str, Any] | None = CONFIG) -> Adapter:
    return FORMAT.read(bundle(tensors, config))


def problems(tensors: Any = TENSORS, config: Mapping[str, Any] | None = CONFIG) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(tensors, config)
    return list(caught.value.problems)


def refusals(adapter: Adapter) -> list[str]:
    with pytest.raises(InputError, match="torchtune's layout cannot hold") as caught:
        FORMAT.write(adapter)
    return list(caught.value.problems)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_its_two_files(family: str) -> None:
    folder = FIXTURES / family / "adapter"
    assert detect(open_bundle(folder / "adapter_model.pt", allow_pickle=True)) == "torchtune"
    assert detect(open_bundle(folder)) == "peft"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("layers.3.attn.q_proj", "model.layers.3.self_attn.q_proj"),
        ("layers.3.attn.k_proj", "model.layers.3.self_attn.k_proj"),
        ("layers.3.attn.v_proj", "model.layers.3.self_attn.v_proj"),
        ("layers.3.attn.output_proj", "model.layers.3.self_attn.o_proj"),
        ("layers.3.mlp.w1", "model.layers.3.mlp.gate_proj"),
        ("layers.3.mlp.w2", "model.layers.3.mlp.down_proj"),
        ("layers.3.mlp.w3", "model.layers.3.mlp.up_proj"),
        ("output", "lm_head"),
    ],
)
def test_names(name: str, path: str) -> None:
    module = read(layer(name)).modules[path]
    assert module.delta is not None
    assert module.magnitude is not None
    assert (module.delta.shape, module.delta.rank) == ((6, 10), 4)
    assert (module.axis, module.scaling) == (MagnitudeAxis.OUT, 3.0)
    assert module.bias_rule is BiasRule.SCALED
    order = RowOrder.INTERLEAVED if path.endswith(("q_proj", "k_proj")) else RowOrder.SAME
    assert (module.up_order, module.magnitude_order) == (order, order)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.attn.q_proj",  # Llama 3.2 Vision
        "layers.0.mlp.experts.w1",
        "layers.0.attn.qkv_proj",
        "layers.x.attn.q_proj",
        "tok_embeddings",
    ],
)
def test_names_of_other_models(name: str) -> None:
    assert len([p for p in problems(layer(name)) if "is not understood" in p]) == 3


def test_plain_lora() -> None:
    tensors = {name: t for name, t in TENSORS.items() if not name.endswith("magnitude")}
    found = read(tensors)
    assert {m.bias_rule for m in found.modules.values()} == {BiasRule.KEEP}
    assert any("plain LoRA" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("layers.0.mlp.w1.magnitude", f"{GATE}: magnitude is missing"),
        ("layers.0.mlp.w1.lora_a.weight", f"{GATE}: lora_a.weight is missing"),
        ("layers.0.mlp.w1.lora_b.weight", f"{GATE}: lora_b.weight is missing"),
    ],
)
def test_a_part_is_missing(name: str, told: str) -> None:
    assert problems({n: t for n, t in TENSORS.items() if n != name}) == [told]


def test_nothing_in_it() -> None:
    assert problems({}) == ["the file holds no LoRA or DoRA module"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "adapter_config.json is missing"),
        ({**CONFIG, "lora_alpha": None}, "'lora_alpha' is missing"),
        ({"lora_alpha": 8}, "'r' is missing"),
        ({**CONFIG, "r": 8}, "says rank 8, the tensors have rank 4"),
        ({**CONFIG, "r": "x"}, "'r' must be a whole number"),
        ({**CONFIG, "base_model_name_or_path": 3}, "must be a string"),
    ],
)
def test_config(config: Mapping[str, Any] | None, told: str) -> None:
    assert any(told in p for p in problems(TENSORS, config))


def test_wrong_tensors() -> None:
    name = "layers.0.mlp.w1.lora_a.weight"
    assert "is I8" in problems(TENSORS | {name: ref(name, 4, 10, dtype=DType.I8)})[0]
    name = "layers.0.mlp.w1.magnitude"
    assert "13 entries, expected 14" in problems(TENSORS | {name: ref(name, 13)})[0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_there_and_back(family: str) -> None:
    """The same tensors, of the same stored ones, and the same config."""
    held = open_bundle(FIXTURES / family / "adapter" / "adapter_model.pt", allow_pickle=True)
    made = FORMAT.write(FORMAT.read(held))
    assert made.tensors == held.tensors
    assert all(not t.view for t in made.tensors.values())
    config = dict(held.documents["adapter_config.json"])
    config["target_modules"] = sorted(config["target_modules"])
    assert made.documents == {"adapter_config.json": config}
    assert FORMAT.read(replace(made, root=held.root)) == FORMAT.read(held)


NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@given(
    paths=st.sets(
        st.tuples(st.integers(0, 200), st.sampled_from(NAMES)).map(
            lambda pair: f"model.layers.{pair[0]}.{pair[1]}"
        )
        | st.just("lm_head"),
        min_size=1,
        max_size=8,
    ),
    rank=st.integers(1, 9),
    alpha=st.floats(0.01, 1000),
    is_plain=st.booleans(),
)
def test_any_adapter_there_and_back(
    paths: set[str], rank: int, alpha: float, is_plain: bool
) -> None:
    """Every scaling to the bit, and every tensor."""
    modules = {}
    for path in sorted(paths):
        order = RowOrder.INTERLEAVED if path.endswith("q_proj") else RowOrder.SAME
        modules[path] = replace(
            dora(path, 6, 10, rank=rank, magnitude=not is_plain),
            scaling=alpha / rank,
            bias_rule=BiasRule.KEEP if is_plain else BiasRule.SCALED,
            up_order=order,
            magnitude_order=order,
        )
    found = FORMAT.read(FORMAT.write(Adapter("torchtune", modules)))
    assert found.modules.keys() == modules.keys()
    for path, module in modules.items():
        again = found.modules[path]
        assert again.delta is not None
        assert module.delta is not None
        assert again.delta.down.stored == module.delta.down.stored
        assert again.delta.up.stored == module.delta.up.stored
        assert replace(again, delta=None, magnitude=None) == replace(
            module, delta=None, magnitude=None
        )


def test_base_model_is_kept() -> None:
    found = read(TENSORS, {**CONFIG, "base_model_name_or_path": "some/model"})
    assert found.base_model == "some/model"
    assert FORMAT.write(found).documents["adapter_config.json"]["base_model_name_or_path"] == (
        "some/model"
    )


def adapter(*modules: Any, **others: Any) -> Adapter:
    scaled = [replace(module, bias_rule=BiasRule.SCALED) for module in modules]
    return Adapter("peft", {module.path: module for module in scaled}, **others)


def test_what_it_cannot_hold() -> None:
    assert FORMAT.write(adapter(dora(GATE, 6, 10))).tensors
    assert "order of its rows" in refusals(adapter(dora(Q, 6, 10)))[0]
    assert "no module that becomes" in refusals(adapter(dora("model.embed", 6, 10)))[0]
    assert "trained whole" in refusals(adapter(dora(GATE, 6, 10), replaced={"a": ref("a", 1)}))[0]
    other = dora("lm_head", 6, 10, rank=2)
    assert "one rank for all" in refusals(adapter(dora(GATE, 6, 10), other))[0]
    other = replace(dora("lm_head", 6, 10), scaling=1.0)
    assert "one scaling for all" in refusals(adapter(dora(GATE, 6, 10), other))[0]
    other = dora("lm_head", 6, 10, magnitude=False)
    assert refusals(adapter(dora(GATE, 6, 10), other)) == [
        "some modules have a magnitude and some have none"
    ]
    kept = replace(dora(GATE, 6, 10), bias_rule=BiasRule.KEEP)
    assert "a bias that is kept" in refusals(Adapter("peft", {GATE: kept}))[0]
    mixed = replace(dora(Q, 6, 10), magnitude_order=RowOrder.INTERLEAVED)
    assert any("rows in another order" in p for p in refusals(adapter(mixed)))


def export(**config: Any) -> Adapter:
    names = {
        f"base_model.model.{path}.{part}": shape
        for path in (Q, GATE)
        for part, shape in (
            ("lora_A.weight", (4, 10)),
            ("lora_B.weight", (6, 4)),
            ("lora_magnitude_vector", (6,)),
        )
    }
    return PEFT.read(bundle(names, {**CONFIG, **config}))


@pytest.mark.parametrize("config", [{}, {"base_model_name_or_path": "some/model"}])
def test_its_export_is_recognised(config: dict[str, Any]) -> None:
    """By the keys of its config, which no version of PEFT leaves out."""
    found = export(**config)
    assert found.modules[Q].magnitude_order is RowOrder.INTERLEAVED
    assert found.modules[Q].up_order is RowOrder.SAME
    assert found.modules[GATE].magnitude_order is RowOrder.SAME
    assert {m.bias_rule for m in found.modules.values()} == {BiasRule.SCALED}
    assert any("written by torchtune" in note for note in found.notes)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"use_dora": False}, {"bias": "none"}])
def test_what_is_not_its_export(config: dict[str, Any]) -> None:
    found = export(**config)
    assert {m.magnitude_order for m in found.modules.values()} == {RowOrder.SAME}
    assert {m.bias_rule for m in found.modules.values()} == {BiasRule.KEEP}
