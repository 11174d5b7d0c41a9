from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from dora_convert.core.adapter import Adapter, BiasRule, MagnitudeAxis, RowOrder
from dora_convert.core.patterns import first_matches
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.errors import InputError
from dora_convert.formats import peft
from dora_convert.formats.peft import FORMAT
from dora_convert.planning.checks import without
from dora_convert.storage.bundle import open_bundle

from ..core.values import bundle, ref

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "use_dora": True}
Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def layer(
    path: str = Q, out: int = 6, inner: int = 10, rank: int = 4, *, prefix: str = PREFIX
) -> dict[str, TensorRef]:
    name = f"{prefix}{path}"
    held = [
        ref(f"{name}.lora_A.weight", rank, inner),
        ref(f"{name}.lora_B.weight", out, rank),
        ref(f"{name}.lora_magnitude_vector", out),
    ]
    return {t.spec.name: t for t in held}


def renamed(tensors: dict[str, TensorRef], old: str, new: str) -> dict[str, TensorRef]:
    names = {name: name.replace(old, new) for name in tensors}
    return {names[n]: ref(names[n], *t.spec.shape) for n, t in tensors.items()}


def read(tensors: Any, *, axis: MagnitudeAxis | None = None, **config: Any) -> Adapter:
    return FORMAT.read(bundle(tensors, CONFIG | config), axis=axis)


def problems(tensors: Any, *, axis: MagnitudeAxis | None = None, **config: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(tensors, axis=axis, **config)
    return list(caught.value.problems)


def only_problem(tensors: Any, **config: Any) -> str:
    (problem,) = problems(tensors, **config)
    return problem


# Names


@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight", ".mine.weight"])
def test_spellings_of_the_magnitude(ending: str) -> None:
    spelled = renamed(layer(), "lora_magnitude_vector", f"lora_magnitude_vector{ending}")
    module = read(spelled).modules[Q]
    assert module.magnitude is not None
    assert module.magnitude.stored.name.endswith(f"lora_magnitude_vector{ending}")
    assert module.magnitude.spec.shape == (6,)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("raw", [False, True])
def test_prefix_and_adapter_name(prefix: str, raw: bool) -> None:
    tensors = layer(prefix=prefix)
    if raw:
        tensors = renamed(tensors, ".weight", ".default.weight")
    module = read(tensors).modules[Q]
    assert module.scaling == 3.0
    assert module.delta is not None
    assert module.delta.shape == (6, 10)
    assert module.axis is MagnitudeAxis.OUT


@pytest.mark.parametrize(
    "name",
    [
        "module.base_model.model.model.layers.0.self_attn.q_proj",
        "module._orig_mod.base_model.model.model.layers.0.self_attn.q_proj",
        "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model._orig_mod.model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj",
        "base_model.model.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module"
        ".self_attn._orig_mod.q_proj",
        "_fsdp_wrapped_module._orig_mod.base_model.model._fsdp_wrapped_module.model.layers.0"
        "._checkpoint_wrapped_module._orig_mod._fsdp_wrapped_module.self_attn.q_proj",
    ],
)
def test_wrappers_of_trainers(name: str) -> None:
    assert list(read(layer(name, prefix="")).modules) == [Q]


def test_a_module_that_is_named_like_a_wrapper_keeps_its_name() -> None:
    assert list(read(layer("my_orig_mod.q")).modules) == ["my_orig_mod.q"]


def test_two_adapters_in_one_file() -> None:
    one = renamed(layer(), ".weight", ".one.weight")
    two = renamed(layer("k"), ".weight", ".two.weight")
    assert "several adapters (one, two)" in only_problem(one | two)


def test_two_adapters_in_modules_to_save() -> None:
    tensors = renamed(layer(), ".weight", ".one.weight")
    tensors |= {n: ref(n, 3) for n in (f"{PREFIX}norm.modules_to_save.{a}.weight" for a in "ab")}
    assert any("several adapters" in p for p in problems(tensors, modules_to_save=["norm"]))


def test_one_part_twice() -> None:
    twice = ref(f"{Q}.lora_A.default.weight", 4, 10)
    found = problems(layer() | {twice.spec.name: twice})
    assert any("are the same part of one module" in p for p in found)


def test_unknown_tensor_and_how_to_leave_it_out() -> None:
    tensors = layer() | {"base_model.model.x.lora_diag": ref("base_model.model.x.lora_diag", 4)}
    held = bundle(tensors, CONFIG)
    with pytest.raises(InputError) as caught:
        FORMAT.read(held)
    assert caught.value.problems == ("base_model.model.x.lora_diag [4] is not understood",)
    assert "--ignore" in caught.value.hint
    assert list(FORMAT.read(without(held, ["*.lora_diag"])).modules) == [Q]


def test_nothing_in_it() -> None:
    assert "holds no LoRA or DoRA module" in only_problem({})


# Tensors


@pytest.mark.parametrize(
    ("absent", "told"),
    [
        (["lora_A.weight"], "lora_A is missing"),
        (["lora_B.weight"], "lora_B is missing"),
        (["lora_A.weight", "lora_B.weight"], "lora_A is missing"),
    ],
)
def test_missing_factor(absent: list[str], told: str) -> None:
    tensors = layer() | layer("other")
    for part in absent:
        del tensors[f"{PREFIX}{Q}.{part}"]
    assert any(p.startswith(Q) and told in p for p in problems(tensors))


def test_missing_magnitude_of_one_module() -> None:
    tensors = layer() | layer("other")
    del tensors[f"{PREFIX}other.lora_magnitude_vector"]
    assert only_problem(tensors) == "other: lora_magnitude_vector is missing"


def test_magnitude_alone() -> None:
    held = {f"{PREFIX}{Q}.lora_magnitude_vector": (6,)}
    assert all(Q in p and "missing" in p for p in problems(held))


def plain() -> dict[str, TensorRef]:
    return {name: t for name, t in layer().items() if "magnitude" not in name}


def test_use_dora_without_any_magnitude() -> None:
    told = only_problem(plain())
    assert "none of the 1 modules has a magnitude" in told
    assert all(name in told for name in ("Megatron-Bridge", "NeMo", "PiSSA"))


def test_nemo_automodel() -> None:
    """It writes PEFT's layout, with whole paths, few keys and a config of its own beside."""
    config = {"task_type": "CAUSAL_LM", "peft_type": "LORA", "r": 4, "lora_alpha": 12}
    config |= {"use_dora": True, "target_modules": [Q], "bias": "none"}
    held = bundle(layer(), config)
    documents = {**held.documents, "automodel_peft_config.json": {"dim": 4, "alpha": 12}}
    found = FORMAT.read(replace(held, documents=documents))
    assert FORMAT.detect(held)
    assert found.modules[Q].scaling == 3.0
    assert found.modules[Q].bias_rule is BiasRule.KEEP
    assert found.modules[Q].magnitude_order is RowOrder.SAME
    assert found.notes == ()


@pytest.mark.parametrize("value", [False, None])
def test_plain_lora(value: Any) -> None:
    found = read(plain(), use_dora=value)
    assert found.modules[Q].magnitude is None
    assert any("plain LoRA" in note for note in found.notes)


@pytest.mark.parametrize("value", [False, None])
def test_magnitudes_that_the_config_does_not_know_of(value: Any) -> None:
    found = read(layer(), use_dora=value)
    assert found.modules[Q].magnitude is not None
    assert any("use_dora" in note for note in found.notes)


def test_ranks_of_a_and_b_disagree() -> None:
    tensors = layer() | {f"{PREFIX}{Q}.lora_B.weight": ref("b", 6, 3)}
    assert "ranks disagree, [4, 10] and [6, 3]" in only_problem(tensors)


def test_rank_of_the_config_disagrees() -> None:
    told = only_problem(layer(), r=8)
    assert "says rank 8 (r), the tensors have rank 4" in told
    told = only_problem(layer(), rank_pattern={"q_proj": 2})
    assert "says rank 2 (rank_pattern['q_proj'])" in told


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_tensor_that_zero3_left_empty(part: str) -> None:
    name = f"{PREFIX}{Q}.{part}"
    assert any("ZeRO-3" in p for p in problems(layer() | {name: ref(name, 0)}))


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_factor_that_is_a_single_number(part: str) -> None:
    name = f"{PREFIX}{Q}.{part}"
    assert f"{name} is empty []" in only_problem(layer() | {name: ref(name)})


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_integer_tensor(part: str) -> None:
    tensors = layer()
    name = f"{PREFIX}{Q}.{part}"
    tensors[name] = ref(name, *tensors[name].spec.shape, dtype=DType.I8)
    assert "is I8, not a float" in only_problem(tensors)


def test_quantised_copy_of_the_base() -> None:
    copy = ref(f"{PREFIX}{Q}.base_layer.weight", 6, 10, dtype=DType.I8)
    assert "I8" in only_problem(layer() | {copy.spec.name: copy})


def test_own_copy_of_the_base_and_its_bias() -> None:
    copy, bias = (ref(f"{PREFIX}{Q}.base_layer.{x}", 6, 10) for x in ("weight", "bias"))
    found = read(layer() | {copy.spec.name: copy, bias.spec.name: bias})
    assert found.modules[Q].weight == copy
    assert found.replaced == {f"{Q}.bias": bias}


@pytest.mark.parametrize("shape", [(5,), (7,), (6, 2), (1, 5)])
def test_magnitude_of_a_wrong_length(shape: tuple[int, ...]) -> None:
    name = f"{PREFIX}{Q}.lora_magnitude_vector"
    assert "the magnitude has" in only_problem(layer() | {name: ref(name, *shape)})


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6,), "OUT"), ((6, 1), "OUT"), ((1, 6), "OUT"), ((1, 10), "IN"), ((10,), "IN")],
)
def test_shape_decides_the_axis(shape: tuple[int, ...], axis: str) -> None:
    name = f"{PREFIX}{Q}.lora_magnitude_vector"
    module = read(layer() | {name: ref(name, *shape)}).modules[Q]
    assert module.axis is MagnitudeAxis[axis]
    assert module.magnitude is not None
    assert module.magnitude.spec.shape == (math.prod(shape),)


def test_row_vector_of_a_square_weight() -> None:
    name = f"{PREFIX}{Q}.lora_magnitude_vector"
    tensors = layer(out=10) | {name: ref(name, 1, 10)}
    assert read(tensors).is_axis_open
    for axis in MagnitudeAxis:
        found = read(tensors, axis=axis)
        assert found.modules[Q].axis is axis
        assert not found.is_axis_open


def test_another_layer_speaks_for_the_square_one() -> None:
    name = f"{PREFIX}square.lora_magnitude_vector"
    tensors = layer("square", 8, 8) | {name: ref(name, 1, 8)}
    for length, axis in ((6, MagnitudeAxis.OUT), (10, MagnitudeAxis.IN)):
        other = f"{PREFIX}{Q}.lora_magnitude_vector"
        found = read(tensors | layer() | {other: ref(other, 1, length)})
        assert {m.axis for m in found.modules.values()} == {axis}
        assert not found.is_axis_open


def test_vector_of_a_square_weight_is_per_output() -> None:
    assert read(layer(out=10)).modules[Q].axis is MagnitudeAxis.OUT
    assert read(layer(out=10), axis=MagnitudeAxis.IN).modules[Q].axis is MagnitudeAxis.IN


def test_one_axis_for_all_layers() -> None:
    """A square layer's vector says nothing; the axis of the others must not be another one."""
    name = f"{PREFIX}{Q}.lora_magnitude_vector"
    tensors = layer() | {name: ref(name, 10)} | layer("square", 8, 8)
    assert "--axis" in only_problem(tensors)
    found = read(tensors, axis=MagnitudeAxis.IN)
    assert {m.axis for m in found.modules.values()} == {MagnitudeAxis.IN}


def test_axis_that_the_length_denies() -> None:
    found = problems(layer(), axis=MagnitudeAxis.IN)
    assert found == [f"{Q}: the magnitude has 6 entries, expected 10"]


def embedding(vocabulary: int = 20, dim: int = 6, *, raw: str = "") -> dict[str, TensorRef]:
    name = f"{PREFIX}model.embed_tokens"
    held = [
        ref(f"{name}.lora_embedding_A{raw}", 4, vocabulary),
        ref(f"{name}.lora_embedding_B{raw}", dim, 4),
        ref(f"{name}.lora_magnitude_vector", dim),
    ]
    return {t.spec.name: t for t in held}


@pytest.mark.parametrize("raw", ["", ".default"])
def test_embedding(raw: str) -> None:
    module = read(embedding(raw=raw)).modules["model.embed_tokens"]
    assert module.delta is not None
    assert module.delta.shape == (20, 6)
    assert module.delta.rank == 4
    assert module.axis is MagnitudeAxis.IN


def test_square_embedding_is_per_dimension_whatever_axis_is_given() -> None:
    tensors = embedding(6, 6) | layer()
    assert read(tensors).modules["model.embed_tokens"].axis is MagnitudeAxis.IN
    found = read(tensors, axis=MagnitudeAxis.OUT).modules
    assert found["model.embed_tokens"].axis is MagnitudeAxis.IN
    assert found[Q].axis is MagnitudeAxis.OUT


@pytest.mark.parametrize("part", ["lora_embedding_A", "lora_embedding_B"])
def test_half_an_embedding(part: str) -> None:
    tensors = embedding()
    del tensors[f"{PREFIX}model.embed_tokens.{part}"]
    assert f"{part} is missing" in only_problem(tensors)


def test_embedding_of_vectors() -> None:
    name = f"{PREFIX}model.embed_tokens.lora_embedding_A"
    found = problems(embedding() | {name: ref(name, 80)})
    assert any("two matrices" in p for p in found)


def convolution(down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, TensorRef]:
    name = f"{PREFIX}conv"
    held = [
        ref(f"{name}.lora_A.weight", *down),
        ref(f"{name}.lora_B.weight", *up),
        ref(f"{name}.lora_magnitude_vector", 1, up[0], *up[2:]),
    ]
    return {t.spec.name: t for t in held}


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 1), (1, 2, 3)])
def test_convolutions(kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    module = read(convolution((4, 5, *kernel), (8, 4, *ones))).modules["conv"]
    assert module.delta is not None
    assert module.delta.shape == (8, 5 * math.prod(kernel))
    assert module.axis is MagnitudeAxis.OUT


def test_grouped_convolution() -> None:
    told = only_problem(convolution((4, 5, 3), (8, 2, 1)))
    assert "grouped convolution" in told
    assert "cannot be merged" in told


@pytest.mark.parametrize("up", [(8, 4), (8, 4, 3), (8, 4, 1, 1)])
def test_convolution_of_other_shapes(up: tuple[int, ...]) -> None:
    found = problems(
        convolution((4, 5, 3), (8, 4, 1)) | {f"{PREFIX}conv.lora_B.weight": ref("b", *up)}
    )
    assert any("[rank, in, k...]" in p for p in found)


# Tensors that were trained whole


def replaced(names: dict[str, tuple[int, ...]], **config: Any) -> dict[str, TensorRef]:
    extra = {f"{PREFIX}{name}": ref(f"{PREFIX}{name}", *shape) for name, shape in names.items()}
    return dict(read(layer() | extra, **config).replaced)


def test_modules_to_save() -> None:
    found = replaced(
        {"lm_head.weight": (9, 6), "model.norm.weight": (6,), "score.dense.weight": (6, 6)},
        modules_to_save=["lm_head", "norm", "score"],
    )
    assert found.keys() == {"lm_head.weight", "model.norm.weight", "score.dense.weight"}


@pytest.mark.parametrize("raw", [False, True])
def test_modules_to_save_in_a_raw_dump(raw: bool) -> None:
    """The adapter's name comes out, the original goes, and nested modules keep their names."""
    tensors = renamed(layer(), ".weight", ".default.weight") if raw else layer()
    for name in (
        "score.modules_to_save.default.weight",
        "head.modules_to_save.default.dense.weight",
        "head.original_module.dense.weight",
        "score.original_module.weight",
    ):
        tensors[f"{PREFIX}{name}"] = ref(f"{PREFIX}{name}", 3, 6)
    found = read(tensors, modules_to_save=["score", "head"]).replaced
    assert {name: t.stored.name for name, t in found.items()} == {
        "score.weight": f"{PREFIX}score.modules_to_save.default.weight",
        "head.dense.weight": f"{PREFIX}head.modules_to_save.default.dense.weight",
    }


def test_modules_to_save_of_a_resized_embedding() -> None:
    """PEFT saves three copies of it; the middle one is the trained one."""
    names = ["weight", "modules_to_save.weight", "original_module.weight"]
    found = replaced({f"embed_tokens.{n}": (9, 6) for n in names}, modules_to_save=["embed_tokens"])
    assert {n: t.stored.name for n, t in found.items()} == {
        "embed_tokens.weight": f"{PREFIX}embed_tokens.modules_to_save.weight"
    }


def test_modules_to_save_are_matched_at_any_character() -> None:
    assert "pre_classifier.weight" in replaced(
        {"pre_classifier.weight": (3, 3)}, modules_to_save=["classifier"]
    )


@pytest.mark.parametrize("name", ["embed_tokens", "transformer.wte", "lm_head", "shared"])
def test_resized_embeddings(name: str) -> None:
    assert list(replaced({f"{name}.weight": (9, 6)})) == [f"{name}.weight"]


def test_all_biases() -> None:
    names = {
        "norm.bias": (6,),
        f"{Q}.base_layer.bias": (6,),
        "block.0.relative_attention_bias.weight": (32, 4),
    }
    assert replaced(names, bias="all").keys() == {
        "norm.bias",
        f"{Q}.bias",
        "block.0.relative_attention_bias.weight",
    }


def test_biases_that_were_not_to_be_trained() -> None:
    name = f"{PREFIX}norm.bias"
    assert "norm.bias [6] is not understood" in only_problem(layer() | {name: ref(name, 6)})


def test_biases_that_old_versions_lost() -> None:
    assert any("did not save them" in n for n in read(layer(), bias="lora_only").notes)
    bias = ref(f"{PREFIX}{Q}.base_layer.bias", 6)
    kept = read(layer() | {bias.spec.name: bias}, bias="lora_only")
    assert kept.replaced == {f"{Q}.bias": bias}
    assert kept.notes == ()


@pytest.mark.parametrize("wrong", [ref("x", 0), ref("x", 6, dtype=DType.I64)])
def test_replaced_by_what_is_no_weight(wrong: TensorRef) -> None:
    tensors = layer() | {f"{PREFIX}norm.weight": wrong}
    assert "is no weight" in only_problem(tensors, modules_to_save=["norm"])


DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("name", [DELTA, f"{DELTA}.default"])
@pytest.mark.parametrize(
    "value", [[7, 3], {"embed_tokens": [7, 3]}, {"x": [1], "embed_tokens": [7, 3]}]
)
def test_token_rows(name: str, value: Any) -> None:
    own = ref("model.embed_tokens.token_adapter.base_layer.weight", 12, 6)
    tensors = layer() | {name: ref(name, 2, 6), own.spec.name: own}
    (rows,) = read(tensors, trainable_token_indices=value).token_rows.values()
    assert rows.indices == (7, 3)
    assert rows.rows.stored.name == name
    assert rows.weight == own


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        ((2, 6), None),
        ((2, 6), [7]),
        ((2, 6), [7, 3, 1]),
        ((2, 6), [7, 7]),
        ((2, 6), [7, -1]),
        ((2, 6), [7, 1.0]),
        ((2, 6), [True, 3]),
        ((2, 6), {"wte": [7, 3]}),
        ((2, 6), {"embed_tokens": "73"}),
        ((2, 6), "73"),
        ((2,), [7, 3]),
        ((0, 6), []),
    ],
)
def test_token_rows_that_do_not_go_with_the_config(shape: tuple[int, ...], value: Any) -> None:
    told = only_problem(layer() | {DELTA: ref(DELTA, *shape)}, trainable_token_indices=value)
    assert told.startswith("model.embed_tokens: ")


def test_token_rows_of_integers() -> None:
    rows = ref(DELTA, 2, 6, dtype=DType.I64)
    assert "I64" in only_problem(layer() | {DELTA: rows}, trainable_token_indices=[1, 2])


# The config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(["r"], [0, -1, "8", 4.5, True, [4], math.nan]),
        *itertools.product(
            ["lora_alpha"], [math.nan, math.inf, "16", 10**400, True, [1], {"a": 1}]
        ),
        *itertools.product(
            ["rank_pattern"], [[1], "q", {"q": 0}, {"q": "2"}, {"q": None, "x": -1}]
        ),
        *itertools.product(["alpha_pattern"], [[1], "q", {"q": "2"}, {"q": math.nan}]),
        *itertools.product(["use_dora", "use_rslora", "ensure_weight_tying"], [1, "true", [True]]),
        *itertools.product(["base_model_name_or_path", "task_type", "bias"], [1, ["x"], {}]),
        *itertools.product(["modules_to_save"], [1, [1], {"a": 1}]),
        *itertools.product(["fan_in_fan_out"], ["yes", 1]),
    ],
)
def test_nonsense_in_the_config(key: str, value: Any) -> None:
    found = problems(layer(), **{key: value})
    assert any(key in problem for problem in found)


def test_a_rank_beyond_all_measure() -> None:
    assert "says rank 1000000000" in only_problem(layer(), r=10**9)


def test_all_faults_at_once() -> None:
    tensors = layer() | layer("other", rank=3)
    tensors["surplus"] = ref("surplus", 2)
    found = problems(tensors, lora_alpha="x", lora_bias=True, init_lora_weights="pissa")
    for word in ("lora_alpha", "lora_bias", "init_lora_weights", "rank 3", "surplus"):
        assert any(word in problem for problem in found), word


def test_defaults_are_those_of_peft() -> None:
    held = bundle(layer(rank=8), {"peft_type": "LORA", "use_dora": True})
    assert FORMAT.read(held).modules[Q].scaling == 1.0
    held = bundle(layer(rank=8), {"use_dora": True, "lora_alpha": 4})
    assert FORMAT.read(held).modules[Q].scaling == 0.5


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "lora", 3, ["LORA"]])
def test_other_kinds_of_adapter(kind: Any) -> None:
    assert "only LORA" in only_problem(layer(), peft_type=kind)


@pytest.mark.parametrize(
    "init",
    [
        "pissa",
        "PiSSA",
        "pissa_niter_4",
        "olora",
        "corda",
        "lora_ga",
        "loftq",
        "brand_new",
        3,
        ["x"],
    ],
)
def test_initialisations_that_change_the_base(init: Any) -> None:
    told = only_problem(layer(), init_lora_weights=init)
    assert "'init_lora_weights' is" in told
    assert "would be wrong" in told


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_do_not(init: Any) -> None:
    assert list(read(layer(), init_lora_weights=init).modules) == [Q]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("monteclora_config", {"num_samples": 2}),
    ],
)
def test_what_no_merged_weight_can_do(key: str, value: Any) -> None:
    assert f"'{key}'" in only_problem(layer(), **{key: value})
    assert list(read(layer(), **{key: None}).modules) == [Q]


def test_who_it_was_trained_on() -> None:
    found = read(
        layer(), base_model_name_or_path="me/base", task_type="SEQ_CLS", fan_in_fan_out=True
    )
    assert (found.base_model, found.task, found.meets_transposed) == ("me/base", "SEQ_CLS", True)
    assert read(layer(), base_model_name_or_path="").base_model is None


# Scaling by pattern


def test_scaling() -> None:
    assert read(layer()).modules[Q].scaling == 3.0
    assert read(layer(), use_rslora=True).modules[Q].scaling == 6.0
    tensors = layer() | layer("model.layers.1.mlp.up_proj", rank=9)
    found = read(
        tensors,
        use_rslora=True,
        rank_pattern={"up_proj": 9},
        alpha_pattern={r"layers\.1\..*": 6, "up_proj": 100, "q_proj": -2.5},
    ).modules
    assert found["model.layers.1.mlp.up_proj"].scaling == 2.0
    assert found[Q].scaling == -1.25


PATHS = [
    "q_proj",
    "model.layers.0.q_proj",
    "model.layers.0.xq_proj",
    "model.layers.1.q_proj",
    "model.layers.11.q_proj",
    "model.layers.0.k_proj",
    "model.layers.1.mlp.experts.3.down_proj",
    "base.model.layers.0.k_proj",
    "a",
    "x.a",
    "model.layers.1",
]
PATTERNS = [
    "q_proj", "layers.1.q_proj", "layers.1", r"^model\.layers\.0\.k_proj", "^q_proj", "proj",
    "a|q_proj", "base_model.model.model.layers.0.q_proj", r"layers\.\d+\.q_proj", ".*_proj",
    r"model\.layers\.(0|11)\..*", "", ".", "q_proj$", "(?i)Q_PROJ", "[qk]_proj", r"\w+", "q_proj.",
    r"experts\.[0-3]\.down_proj", "(x)?a", "a{1}", r".*\.q_proj|a",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_each_pattern_matches_as_in_peft(path: str) -> None:
    for pattern in PATTERNS:
        try:
            # PEFT returns the path itself where nothing matches.
            expected = get_pattern_key([pattern], path)
        except re.error:
            with pytest.raises(InputError, match="not a regular expression"):
                first_matches([pattern], [path], where="here")
        else:
            found = first_matches([pattern], [path], where="here")
            assert found.get(path, path) == expected, pattern


def test_the_first_pattern_wins_as_in_peft() -> None:
    usable = [p for p in PATTERNS if p != "(?i)Q_PROJ"]
    for keys in (usable, usable[::-1], usable[3:] + usable[:3]):
        found = first_matches(keys, PATHS, where="here")
        assert {p: found.get(p, p) for p in PATHS} == {p: get_pattern_key(keys, p) for p in PATHS}


@pytest.mark.parametrize(
    ("key", "pattern"),
    [("rank_pattern", "(a+)+b"), ("alpha_pattern", "(a|a)" * 40 + "b")],
)
def test_pattern_that_would_run_for_ever(key: str, pattern: str) -> None:
    tensors = layer("a" * 40 + "c")
    with pytest.raises(InputError, match="takes too long") as caught:
        read(tensors, **{key: {"q_proj": 4, pattern: 4}})
    assert pattern[:60] in str(caught.value)
    assert key in str(caught.value.where)


@pytest.mark.parametrize("pattern", ["(", "[a", "*x", "(?P<n>a)(?P<n>b)", "a{1000000000000}", "\\"])
def test_pattern_that_is_none(pattern: str) -> None:
    with pytest.raises(InputError, match="not a regular expression"):
        read(layer(), alpha_pattern={pattern: 4})


# A file as PEFT itself wrote it is read through storage, names and all


def test_from_a_folder(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(t.spec.shape) for name, t in layer().items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert list(FORMAT.read(open_bundle(tmp_path)).modules) == [Q]


@given(st.lists(st.text("ab.", max_size=4), max_size=4), st.text("ab.", min_size=1, max_size=9))
def test_modules_to_save_are_ends_of_enclosing_paths(keys: list[str], path: str) -> None:
    """As PEFT has it: `any(key.endswith(target) for target in modules_to_save)` on each module."""
    pieces = path.split(".")
    enclosing = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
    expected = any(module.endswith(key) for key in keys for module in enclosing)
    assert peft._is_saved(path, set(keys), {len(key) for key in keys}) == expected
