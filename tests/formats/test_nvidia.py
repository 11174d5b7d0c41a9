from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_convert import api
from dora_convert.core.adapter import Adapter, MagnitudeAxis
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.errors import InputError
from dora_convert.formats.nvidia import FORMAT

from ..core.values import bundle, ref

CONFIG: dict[str, Any] = {"peft_type": "DORA", "r": 4, "lora_alpha": 12}
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
PREFIX = "base_model.model."
NVIDIA = Path(__file__).parents[2] / "fixtures" / "nvidia"


def magnitude(path: str, *shape: int) -> dict[str, TensorRef]:
    name = f"{PREFIX}{path}.weight_m_wdecomp.weight"
    return {name: ref(name, *shape)}


def layer(path: str = Q, out: int = 6, inner: int = 10, rank: int = 4) -> dict[str, TensorRef]:
    name = f"{PREFIX}{path}"
    held = [
        ref(f"{name}.lora_A.weight", rank, inner),
        ref(f"{name}.lora_B.weight", out, rank),
    ]
    return {t.spec.name: t for t in held} | magnitude(path, out, 1)


def read(tensors: Any, *, axis: MagnitudeAxis | None = None, **config: Any) -> Adapter:
    return FORMAT.read(bundle(tensors, CONFIG | config), axis=axis)


def problems(tensors: Any, *, axis: MagnitudeAxis | None = None, **config: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(tensors, axis=axis, **config)
    return list(caught.value.problems)


def only_problem(tensors: Any, **config: Any) -> str:
    (problem,) = problems(tensors, **config)
    return problem


def test_low_rank_module() -> None:
    module = read(layer()).modules[Q]
    assert module.delta is not None
    assert module.magnitude is not None
    assert (module.delta.shape, module.delta.rank) == ((6, 10), 4)
    assert module.magnitude.spec.shape == (6,)
    assert (module.axis, module.scaling) == (MagnitudeAxis.OUT, 3.0)


def test_magnitude_only_module() -> None:
    found = read(layer() | magnitude(UP, 14, 1))
    module = found.modules[UP]
    assert module.delta is None
    assert module.magnitude is not None
    assert module.magnitude.spec.shape == (14,)
    assert module.axis is MagnitudeAxis.OUT


def test_dora_simple_changes_nothing() -> None:
    assert read(layer(), dora_simple=True) == read(layer(), dora_simple=False)


def test_head_that_8_bit_training_wrapped() -> None:
    assert list(read(layer("lm_head.0")).modules) == ["lm_head"]
    assert list(read(layer("model.lm_head.0")).modules) == ["model.lm_head"]
    assert list(read(layer("my_lm_head.0")).modules) == ["my_lm_head.0"]


def test_head_twice() -> None:
    assert any("twice" in p for p in problems(layer("lm_head.0") | layer("lm_head")))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_an_update(part: str) -> None:
    tensors = layer()
    del tensors[f"{PREFIX}{Q}.{part}.weight"]
    assert only_problem(tensors) == f"{Q}: {part} is missing"


def test_no_magnitude() -> None:
    tensors = layer()
    del tensors[f"{PREFIX}{Q}.weight_m_wdecomp.weight"]
    assert only_problem(tensors | layer("other")) == f"{Q}: weight_m_wdecomp is missing"


def test_no_module_at_all() -> None:
    assert "holds no DoRA module" in only_problem({})


def test_ranks_that_disagree() -> None:
    assert "says rank 8, the tensors have rank 4" in only_problem(layer(), r=8)
    told = only_problem(layer() | {f"{PREFIX}{Q}.lora_B.weight": ref("b", 6, 3)})
    assert "ranks disagree" in told


@pytest.mark.parametrize("shape", [(5, 1), (10, 1), (5,)])
def test_magnitude_of_a_wrong_length(shape: tuple[int, ...]) -> None:
    told = only_problem(layer() | magnitude(Q, *shape))
    assert f"the magnitude has {shape[0]} entries, expected 6" in told


def test_axis_that_the_user_gives() -> None:
    tensors = layer() | magnitude(Q, 10)
    assert read(tensors, axis=MagnitudeAxis.IN).modules[Q].axis is MagnitudeAxis.IN
    assert read(layer(), axis=MagnitudeAxis.OUT).modules[Q].axis is MagnitudeAxis.OUT


@pytest.mark.parametrize("held", [layer(inner=6), {}])
def test_row_vector_is_not_what_the_reference_stores(held: Any) -> None:
    """`[1, n]` on a square weight, or alone, may be per output or per input."""
    tensors = held | magnitude(Q, 1, 6)
    for axis in MagnitudeAxis:
        assert read(tensors, axis=axis).modules[Q].axis is axis


def test_row_vector_of_a_square_weight_is_left_to_the_base() -> None:
    assert read(layer(inner=6) | magnitude(Q, 1, 6)).is_axis_open
    assert not read(layer(inner=6)).is_axis_open


def test_row_vector_alone() -> None:
    assert "--axis" in only_problem(magnitude(Q, 1, 6))


def test_row_vector_that_fits_one_axis() -> None:
    assert read(layer() | magnitude(Q, 1, 10)).modules[Q].axis is MagnitudeAxis.IN


def test_empty_tensor() -> None:
    assert any("ZeRO-3" in p for p in problems(layer() | magnitude(Q, 0)))


def test_integers() -> None:
    name = f"{PREFIX}{Q}.lora_A.weight"
    assert "is I8" in only_problem(layer() | {name: ref(name, 4, 10, dtype=DType.I8)})


def test_unknown_tensor() -> None:
    assert "x.y [2] is not understood" in only_problem(layer() | {"x.y": ref("x.y", 2)})


def test_tensors_that_were_trained_whole() -> None:
    held = {f"{PREFIX}{n}": ref(f"{PREFIX}{n}", 6) for n in ("lm_head.weight", "norm.bias")}
    found = read(layer() | held, modules_to_save=["lm_head"], bias="all")
    assert found.replaced.keys() == {"lm_head.weight", "norm.bias"}
    assert "norm.bias [6] is not understood" in only_problem(
        layer() | held, modules_to_save=["lm_head"]
    )


@pytest.mark.parametrize("wrong", [ref("x", 0), ref("x", 6, dtype=DType.I64)])
def test_replaced_by_what_is_no_weight(wrong: TensorRef) -> None:
    tensors = layer() | {f"{PREFIX}norm.weight": wrong}
    assert "is no weight" in only_problem(tensors, modules_to_save=["norm"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", "4"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("fan_in_fan_out", True),
        ("fan_in_fan_out", "yes"),
        ("enable_lora", [True, False]),
        ("modules_to_save", 3),
        ("bias", 3),
        ("base_model_name_or_path", 3),
        ("task_type", 3),
    ],
)
def test_nonsense_in_the_config(key: str, value: Any) -> None:
    assert any(f"'{key}'" in p for p in problems(layer(), **{key: value}))


def test_magnitudes_alone_need_no_scaling() -> None:
    held = bundle(magnitude(UP, 14, 1), {"peft_type": "DORA"})
    assert list(FORMAT.read(held).modules) == [UP]


def test_no_config() -> None:
    with pytest.raises(InputError) as caught:
        FORMAT.read(bundle(layer(), None))
    assert any("adapter_config.json is missing" in p for p in caught.value.problems)


# The LLaVA fork: its mark is how the config spells the list of magnitude-only modules.
LLAVA: dict[str, Any] = {"wdecompose_target_modules": ["up_proj"]}


def as_llava(tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """The names of its second file: with the adapter's name in them."""
    names = {name: name.replace("wdecomp.weight", "wdecomp.default.weight") for name in tensors}
    return {new: ref(new, *tensors[old].spec.shape) for old, new in names.items()}


def test_llava_names() -> None:
    module = read(as_llava(layer()), **LLAVA).modules[Q]
    assert module.magnitude is not None
    assert (module.magnitude.spec.shape, module.scaling) == ((6,), 3.0)


def test_llava_does_not_use_a_magnitude_alone() -> None:
    found = read(as_llava(layer() | magnitude(UP, 14, 1)), **LLAVA)
    assert list(found.modules) == [Q]
    assert "1 modules have a magnitude alone" in found.notes[0]


def test_llava_keeps_the_projector() -> None:
    name = f"{PREFIX}model.mm_projector.0.weight"
    found = read(as_llava(layer()) | {name: ref(name, 8, 6)}, **LLAVA)
    assert list(found.replaced) == ["model.mm_projector.0.weight"]


def test_llava_files_merge(tmp_path: Path) -> None:
    """The reference's tensors as its LLaVA trainer lays them out, against float64."""
    tensors = torch.load(NVIDIA / "adapter" / "adapter_model.bin", weights_only=True)
    first = {name: t for name, t in tensors.items() if "wdecomp" not in name}
    second = {
        name.replace("wdecomp.weight", "wdecomp.default.weight"): t
        for name, t in tensors.items()
        if "wdecomp" in name
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save(first, adapter / "adapter_model.bin")
    torch.save(second, adapter / "non_lora_trainables.bin")
    config = json.loads((NVIDIA / "adapter" / "adapter_config.json").read_text())
    alone = config.pop("Wdecompose_target_modules")
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"wdecompose_target_modules": alone})
    )
    options = api.ReadOptions(allow_pickle=True)
    api.merge(adapter, tmp_path / "out", base=NVIDIA / "base", options=options)
    base = load_file(NVIDIA / "base" / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    touched = set()
    for name, weight in base.items():
        key = PREFIX + name.removesuffix(".weight")
        expected = weight.double()
        if f"{key}.lora_A.weight" in tensors:
            down, up = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
            v = expected + config["lora_alpha"] / config["r"] * up @ down
            m = tensors[f"{key}.weight_m_wdecomp.weight"].double()
            expected = m * v / v.square().sum(dim=1, keepdim=True).sqrt()
            touched.add(name)
        # One rounding to float16.
        assert torch.allclose(merged[name].double(), expected, rtol=2**-10, atol=1e-7), name
    assert touched
