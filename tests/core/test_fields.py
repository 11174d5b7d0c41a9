from __future__ import annotations

import math
import re
from typing import Any

import pytest

from dora_convert.core.fields import Fields


def read(method: str, value: Any, *default: Any) -> tuple[Any, list[str]]:
    problems: list[str] = []
    fields = Fields({"key": value}, "a.json", problems)
    return getattr(fields, method)("key", *default), problems


GOOD: list[tuple[str, Any, tuple[Any, ...], Any]] = [
    ("flag", True, (), True),
    ("flag", False, (), False),
    ("flag", None, (), False),
    ("text", "x", (), "x"),
    ("text", "", (), ""),
    ("text", None, (), None),
    ("count", 1, (8,), 1),
    ("count", 10**9, (8,), 10**9),
    ("count", None, (8,), 8),
    ("number", 0, (1.0,), 0.0),
    ("number", -2.5, (1.0,), -2.5),
    ("number", None, (1.0,), 1.0),
    ("counts", {"a": 2, "b": 3}, (), {"a": 2, "b": 3}),
    ("counts", None, (), {}),
    ("numbers", {"a": 2, "b": -0.5}, (), {"a": 2.0, "b": -0.5}),
    ("numbers", {}, (), {}),
    ("strings", ["a", "b"], (), ("a", "b")),
    ("strings", "abc", (), ("abc",)),
    ("strings", None, (), ()),
    ("strings", [], (), ()),
]


@pytest.mark.parametrize(("method", "value", "default", "expected"), GOOD)
def test_good_values(method: str, value: Any, default: tuple[Any, ...], expected: Any) -> None:
    found, problems = read(method, value, *default)
    assert problems == []
    assert found == expected
    assert type(found) is type(expected)


BAD: list[tuple[str, Any, tuple[Any, ...], Any]] = [
    ("flag", 1, (), False),
    ("flag", "false", (), False),
    ("flag", [], (), False),
    ("text", 3, (), None),
    ("text", ["x"], (), None),
    ("count", 0, (8,), 8),
    ("count", 10**40, (8,), 8),
    ("count", -3, (8,), 8),
    ("count", 4.0, (8,), 8),
    ("count", True, (8,), 8),
    ("count", "4", (8,), 8),
    ("number", math.nan, (1.0,), 1.0),
    ("number", -math.inf, (1.0,), 1.0),
    ("number", "1", (1.0,), 1.0),
    ("number", True, (1.0,), 1.0),
    ("number", 10**400, (1.0,), 1.0),
    ("counts", [1], (), {}),
    ("counts", {"a": 0}, (), {"a": 1}),
    ("counts", {"a": "1"}, (), {"a": 1}),
    ("numbers", "x", (), {}),
    ("numbers", {"a": math.nan}, (), {"a": 1.0}),
    ("strings", 3, (), ()),
    ("strings", ["a", 3], (), ()),
    ("strings", {"a": 1}, (), ()),
]


@pytest.mark.parametrize(("method", "value", "default", "expected"), BAD)
def test_bad_values(method: str, value: Any, default: tuple[Any, ...], expected: Any) -> None:
    """They are recorded, and replaced by something that lets reading go on."""
    found, problems = read(method, value, *default)
    assert len(problems) == 1
    assert re.match(r"a\.json: ['\"]key", problems[0])
    assert found == expected


def test_endless_values_are_cut() -> None:
    _, (problem,) = read("text", ["x" * 10_000])
    assert len(problem) < 150


def test_faults_of_one_mapping_are_all_named() -> None:
    _, problems = read("counts", {"a": 0, "b": 2, "c": "x"})
    assert len(problems) == 2
    assert "key['a']" in problems[0]
    assert "key['c']" in problems[1]


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), (False, False), ([], False), (0, False), ([1], True)]
)
def test_presence(value: Any, expected: bool) -> None:
    found, problems = read("has", value)
    assert found is expected
    assert problems == []
    assert not Fields({}, "a.json", []).has("key")


def test_rejecting() -> None:
    problems: list[str] = []
    Fields({}, "a.json", problems).reject("r", "is wrong")
    assert problems == ["a.json: 'r' is wrong"]
