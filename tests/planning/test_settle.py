"""Axis, bias and the weights to measure, decided without reading a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from dora_convert.core.adapter import BiasRule, LayerKind, MagnitudeAxis, RowOrder
from dora_convert.core.evidence import Moments, fits_better
from dora_convert.core.tensors import DType
from dora_convert.errors import MismatchError
from dora_convert.planning.settle import (
    open_questions,
    squares,
    subjects,
    with_axis,
    with_bias_rule,
)

from ..core.values import adapter, checkpoint, dora, magnitude_only, ref

OUT, IN = MagnitudeAxis.OUT, MagnitudeAxis.IN
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def moments(correlation: float, count: int = 900) -> Moments:
    """Of that many pairs; the noise of 900 is 0.1."""
    return Moments(count, 2.0, 8.0, correlation * 4.0)


def test_moments() -> None:
    total = moments(0.5, 400) + moments(0.3, 500)
    assert total.count == 900
    assert total.noise == pytest.approx(0.1)
    assert total.correlation == pytest.approx(0.4)
    assert total.slope == pytest.approx(0.2)
    assert (Moments().correlation, Moments().slope) == (0.0, 0.0)
    assert Moments(10, 0.0, 1.0, 0.0).correlation == 0.0


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (0.9, 0.0, True),
        (0.9, 0.85, False),
        (0.09, -0.5, False),
        (0.11, 0.0, True),
        (0.0, 0.9, False),
    ],
)
def test_better_beyond_noise(one: float, other: float, expected: bool) -> None:
    assert fits_better(moments(one), moments(other)) is expected


def test_noise_is_that_of_the_fewer() -> None:
    assert fits_better(moments(0.5), moments(0.0))
    assert not fits_better(moments(0.5, 9), moments(0.0))
    assert not fits_better(moments(0.5), moments(0.0, 9))


OPEN = adapter(dora(Q, 8, 8), dora(UP, 8, 8, magnitude=False), is_axis_open=True)


@pytest.mark.parametrize("axis", MagnitudeAxis)
def test_axis_of_the_better_fit(axis: MagnitudeAxis) -> None:
    found = with_axis(OPEN, {axis: moments(0.8), axis.flipped: moments(0.05)})
    assert found.modules[Q].axis is axis
    assert found.modules[UP].axis is OUT
    assert not found.is_axis_open
    assert f"one per {axis.value}put" in found.notes[0]
    assert "0.80" in found.notes[0]


@pytest.mark.parametrize(
    "evidence",
    [
        {OUT: moments(0.08), IN: moments(-0.02)},
        {OUT: moments(0.9), IN: moments(0.88)},
        {OUT: moments(-0.9), IN: moments(-0.5)},
        {},
    ],
)
def test_axis_within_noise(evidence: Mapping[MagnitudeAxis, Moments]) -> None:
    with pytest.raises(MismatchError, match="all weights are square") as caught:
        with_axis(OPEN, evidence)
    assert "--axis" in caught.value.hint


@pytest.mark.parametrize("there", [BiasRule.KEEP, BiasRule.SCALED])
def test_a_rule_for_no_bias(there: BiasRule) -> None:
    """Without a bias in the base, either rule is as good; with one, the trainer's holds."""
    other = BiasRule.KEEP if there is BiasRule.SCALED else BiasRule.SCALED
    shapes = {f"{Q}.weight": (8, 8), f"{Q}.bias": (8,), f"{UP}.weight": (8, 8)}
    modules = [replace(dora(path, 8, 8), bias_rule=there) for path in (Q, UP)]
    found = with_bias_rule(adapter(*modules), checkpoint(shapes), other)
    assert found.modules[Q].bias_rule is there
    assert found.modules[UP].bias_rule is other


def test_a_bias_that_the_adapter_brings() -> None:
    module = replace(dora(Q, 8, 8), bias_rule=BiasRule.SCALED)
    held = adapter(module, replaced={f"{Q}.bias": ref("b", 8)})
    found = with_bias_rule(held, checkpoint({f"{Q}.weight": (8, 8)}), BiasRule.KEEP)
    assert found.modules[Q].bias_rule is BiasRule.SCALED


def test_subjects() -> None:
    shapes = {f"{Q}.weight": (8, 6), f"{UP}.weight": (12, 6)}
    held = adapter(dora(Q, 8, 6), dora(UP, 12, 6))
    found = subjects(held, checkpoint(shapes))
    assert [s.module.path for s in found] == [Q, UP]
    assert [(p.base.spec.name, p.start, p.stop) for p in found[0].weight] == [(f"{Q}.weight", 0, 8)]


def test_subjects_that_are_stored_fused() -> None:
    """Of this model v is a part of a stored tensor; rows of q and k are stored in another order."""
    config = {"model_type": "gradium_phonon_tts"}
    held = adapter(*(dora(f"x.self_attn.{name}_proj", 8, 6) for name in "qkv"))
    (found,) = subjects(held, checkpoint({"x.self_attn.in_proj.weight": (24, 6)}, config))
    assert found.module.path == "x.self_attn.v_proj"
    assert [(p.start, p.stop) for p in found.weight] == [(16, 24)]


def test_a_copy_in_the_adapter_is_the_weight() -> None:
    copy = ref("copy", 9, 6)
    held = adapter(dora(Q, 9, 6, weight=copy))
    (found,) = subjects(held, checkpoint({f"{Q}.weight": (8, 6)}))
    assert found.weight[0].base is copy


@pytest.mark.parametrize(
    ("module", "shape", "dtype"),
    [
        (dora("other", 8, 6), (8, 6), DType.F32),  # not found
        (dora(Q, 8, 6), (8, 7), DType.F32),  # does not fit
        (dora(Q, 8, 6), (8, 6, 1), DType.F32),
        (dora(Q, 8, 6), (8, 6), DType.I8),  # quantised
        (dora(Q, 8, 6, magnitude=False), (8, 6), DType.F32),
        (replace(dora(Q, 8, 6), kind=LayerKind.EMBEDDING), (8, 6), DType.F32),
        (magnitude_only(Q, 7), (8, 6), DType.F32),
    ],
)
def test_what_is_left_to_the_plan(module: Any, shape: tuple[int, ...], dtype: DType) -> None:
    assert subjects(adapter(module), checkpoint({f"{Q}.weight": shape}, dtype=dtype)) == []


def test_transposed_subjects() -> None:
    gpt2 = {"model_type": "gpt2"}
    held = adapter(dora("h.0.attn.c_attn", 24, 8), dora("h.0.x", 24, 8))
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.x.weight": (24, 8)}
    found = subjects(held, checkpoint(shapes, gpt2))
    assert [s.is_transposed for s in found] == [True, False]
    said = subjects(adapter(dora("h.0.y", 24, 8)), checkpoint({"h.0.y.weight": (8, 24)}))
    assert said == []
    said = subjects(
        adapter(dora("h.0.y", 24, 8)), checkpoint({"h.0.y.weight": (8, 24)}), transposed=["*.y"]
    )
    assert [s.is_transposed for s in said] == [True]


def test_squares() -> None:
    shapes = {f"{Q}.weight": (8, 8), f"{UP}.weight": (12, 8), "o.weight": (8, 8)}
    held = adapter(dora(Q, 8, 8), dora(UP, 12, 8), magnitude_only("o", 8))
    assert [s.module.path for s in squares(subjects(held, checkpoint(shapes)))] == [Q]


def test_what_is_open_without_the_base() -> None:
    plain = dora(Q, 8, 8)
    assert open_questions(adapter(plain)) == []
    assert "the base decides" in open_questions(OPEN)[0]
    marked = replace(plain, magnitude_order=RowOrder.INTERLEAVED)
    assert "order of the rows" in open_questions(adapter(marked))[0]
    scaled = replace(plain, bias_rule=BiasRule.SCALED)
    assert "has a bias" in open_questions(adapter(scaled))[0]
