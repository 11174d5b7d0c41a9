from __future__ import annotations

from typing import Any

import pytest

from dora_convert.errors import InputError, MismatchError
from dora_convert.planning.checks import refuse_quantized, scaled, selected, without
from dora_convert.planning.planner import plan_merge

from ..core.values import adapter, bundle, checkpoint, dora, ref

PATHS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj", "up_proj")]
ALL = adapter(*(dora(path, 8, 8) for path in PATHS), replaced={"norm.weight": ref("n", 8)})


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], PATHS),
        (["*"], [], PATHS),
        (["*.q_proj"], [], [PATHS[0], PATHS[3]]),
        (["layers.1.*", "*q_proj"], [], [PATHS[0], *PATHS[3:]]),
        ([], ["*.q_proj", "layers.0.*"], PATHS[4:]),
        (["*_proj"], ["*.[qv]_proj"], [PATHS[2], PATHS[5]]),
        ([PATHS[1]], [], [PATHS[1]]),
    ],
)
def test_include_and_exclude(include: list[str], exclude: list[str], expected: list[str]) -> None:
    found = selected(ALL, include, exclude)
    assert list(found.modules) == expected
    left_out = len(PATHS) - len(expected)
    assert bool(include or exclude) == any(
        f"{left_out} of 6 modules left out" in note for note in found.notes
    )


@pytest.mark.parametrize(
    ("include", "exclude"), [(["q_proj"], []), ([], ["*"]), (["*.Q_PROJ"], []), ([""], [])]
)
def test_globs_that_leave_nothing(include: list[str], exclude: list[str]) -> None:
    with pytest.raises(InputError, match="leave no module") as caught:
        selected(ALL, include, exclude)
    assert PATHS[0] in caught.value.hint


def test_ignored_tensors() -> None:
    held = bundle({"a.lora_A.weight": (2, 2), "a.x": (1,), "b.x": (1,)}, {"r": 2})
    assert without(held, []).tensors == held.tensors
    assert list(without(held, ["*.x"]).tensors) == ["a.lora_A.weight"]
    assert list(without(held, ["b.?", "a.lora_A.*"]).tensors) == ["a.x"]
    assert without(held, ["x"]).tensors == held.tensors
    assert without(held, ["*"]).documents == held.documents


@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0, 3.0])
def test_strength_multiplies_the_scaling_alone(strength: float) -> None:
    found = scaled(ALL, strength)
    assert {m.scaling for m in found.modules.values()} == {2.0 * strength}
    assert [m.magnitude for m in found.modules.values()] == [
        m.magnitude for m in ALL.modules.values()
    ]
    assert found.replaced == ALL.replaced
    assert {m.scaling for m in ALL.modules.values()} == {2.0}


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {}}, "unknown"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ],
)
def test_quantised_base(config: dict[str, Any], method: str) -> None:
    held = checkpoint({f"{path}.weight": (8, 8) for path in PATHS}, config)
    with pytest.raises(MismatchError, match="quantised") as caught:
        plan_merge(ALL, held)
    assert f"({method})" in caught.value.what
    assert "--base" in caught.value.hint


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {}}])
def test_a_base_that_is_not(config: dict[str, Any]) -> None:
    refuse_quantized(checkpoint({"a.weight": (8, 8)}, config))
