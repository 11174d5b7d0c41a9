from __future__ import annotations

import pytest

from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.assembly import check_axes, convolution, linear, magnitude
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
    assert magnitude("q", ref("m", 6), (6, 6), problems, axis=None) is None
    assert "--axis" in problems[0]
    for axis in MagnitudeAxis:
        found = magnitude("q", ref("m", 6), (6, 6), [], axis=axis)
        assert found is not None
        assert found[1] is axis


def test_magnitude_of_integers() -> None:
    problems: list[str] = []
    assert magnitude("q", ref("m", 6, dtype=DType.I32), (6, 10), problems, axis=None) is None
    assert "I32, not a float" in problems[0]


def test_axes() -> None:
    out, inner = dora("a", 6, 10), dora("b", 6, 10, axis=MagnitudeAxis.IN)
    plain = dora("c", 6, 10, axis=MagnitudeAxis.IN, magnitude=False)
    problems: list[str] = []
    check_axes([out, out, plain], problems)
    check_axes([inner], problems)
    check_axes([], problems)
    assert problems == []
    check_axes([out, inner], problems)
    assert len(problems) == 1
