from __future__ import annotations

from dataclasses import replace

import pytest

from dora_convert.core.adapter import DoraModule, LayerKind, MagnitudeAxis
from dora_convert.core.assembly import common_axis, convolution, linear, magnitude
from dora_convert.core.tensors import DType

from .values import dora, ref

Shape = tuple[int, ...]


@pytest.mark.parametrize(
    ("down", "up", "told"),
    [
        ((4, 10), (6, 4), None),
        ((1, 1), (1, 1), None),
        ((4, 10), (6, 3), "ranks disagree"),
        ((4, 10), (4, 6), "ranks disagree"),
        ((10,), (6, 4), "expected two matrices"),
        ((4, 10), (6, 4, 1), "expected two matrices"),
        ((0, 10), (6, 0), "is empty"),
        ((), (6, 4), "is empty"),
    ],
)
def test_linear(down: Shape, up: Shape, told: str | None) -> None:
    problems: list[str] = []
    delta = linear("q", ref("A", *down), ref("B", *up), problems)
    assert (delta is None) == bool(problems) == (told is not None)
    if delta is not None:
        assert (delta.shape, delta.rank) == ((up[0], down[1]), down[0])
    else:
        assert problems[0].startswith("q: ")
        assert told is not None
        assert told in problems[0]


@pytest.mark.parametrize(
    ("down", "up", "told"),
    [
        ((4, 5, 3), (6, 4, 1), None),
        ((4, 5, 3, 2), (6, 4, 1, 1), None),
        ((4, 5, 1, 2, 3), (6, 4, 1, 1, 1), None),
        ((4, 5, 3), (6, 2, 1), "grouped convolution"),
        ((4, 5, 3), (6, 3, 1), "ranks disagree"),
        ((4, 5, 3), (6, 8, 1), "ranks disagree"),
        ((4, 5, 3), (6, 4), "expected [rank, in, k...]"),
        ((4, 5, 3), (6, 4, 3), "expected [rank, in, k...]"),
        ((4, 0, 3), (6, 4, 1), "is empty"),
    ],
)
def test_convolution(down: Shape, up: Shape, told: str | None) -> None:
    problems: list[str] = []
    delta = convolution("c", ref("A", *down), ref("B", *up), problems)
    assert (delta is None) == bool(problems) == (told is not None)
    if delta is not None:
        assert delta.rank == 4
        assert delta.shape == (6, ref("A", *down).spec.numel // 4)
    else:
        assert told is not None
        assert told in problems[0]


@pytest.mark.parametrize(
    ("stored", "axis", "expected"),
    [
        ((6,), None, MagnitudeAxis.OUT),
        ((10, 1), None, MagnitudeAxis.IN),
        ((6, 1), MagnitudeAxis.OUT, MagnitudeAxis.OUT),
        ((1, 10), MagnitudeAxis.IN, MagnitudeAxis.IN),
        ((6,), MagnitudeAxis.IN, None),
        ((10,), MagnitudeAxis.OUT, None),
        ((7,), None, None),
        ((60,), None, None),
    ],
)
def test_magnitude(
    stored: Shape, axis: MagnitudeAxis | None, expected: MagnitudeAxis | None
) -> None:
    problems: list[str] = []
    found = magnitude("q", ref("m", *stored), (6, 10), problems, axis=axis)
    assert bool(problems) == (expected is None)
    if found is not None:
        assert found[1] is expected
        assert found[0].spec.shape == (ref("m", *stored).spec.numel,)


def test_magnitude_of_a_square_weight() -> None:
    problems: list[str] = []
    undecided: list[str] = []
    found = magnitude("q", ref("m", 6), (6, 6), problems, axis=None, undecided=undecided)
    assert found is not None
    assert (undecided, problems) == (["q"], [])
    for axis in MagnitudeAxis:
        found = magnitude("q", ref("m", 6), (6, 6), problems, axis=axis, undecided=undecided)
        assert found is not None
        assert found[1] is axis
    assert (undecided, problems) == (["q"], [])


def test_magnitude_of_integers() -> None:
    problems: list[str] = []
    assert magnitude("q", ref("m", 6, dtype=DType.I32), (6, 10), problems, axis=None) is None
    assert "I32, not a float" in problems[0]


OUT, IN = MagnitudeAxis.OUT, MagnitudeAxis.IN


def axes(
    *modules: DoraModule, undecided: tuple[str, ...] = ()
) -> tuple[dict[str, MagnitudeAxis], bool, list[str]]:
    problems: list[str] = []
    found, is_open = common_axis({m.path: m for m in modules}, undecided, problems)
    return {path: m.axis for path, m in found.items()}, is_open, problems


def test_axes_that_agree() -> None:
    plain = dora("c", 6, 10, axis=IN, magnitude=False)
    assert axes(dora("a", 6, 10), plain) == ({"a": OUT, "c": IN}, False, [])
    assert axes() == ({}, False, [])


def test_axes_that_disagree() -> None:
    _, is_open, problems = axes(dora("a", 6, 10), dora("b", 6, 10, axis=IN))
    assert not is_open
    assert len(problems) == 1
    assert "--axis" in problems[0]


@pytest.mark.parametrize("axis", MagnitudeAxis)
def test_one_layer_speaks_for_the_square_ones(axis: MagnitudeAxis) -> None:
    found = axes(dora("a", 6, 10, axis=axis), dora("b", 6, 6), undecided=("b",))
    assert found == ({"a": axis, "b": axis}, False, [])


def test_square_layers_alone_stay_open() -> None:
    assert axes(dora("a", 6, 6), dora("b", 4, 4), undecided=("a", "b"))[1:] == (True, [])


def test_an_embedding_says_nothing_of_the_axis() -> None:
    embedding = replace(dora("e", 6, 10, axis=IN), kind=LayerKind.EMBEDDING)
    found = axes(embedding, dora("b", 6, 6), undecided=("b",))
    assert found == ({"e": IN, "b": OUT}, True, [])
