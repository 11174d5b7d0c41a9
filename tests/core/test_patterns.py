from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_convert.core import patterns
from dora_convert.core.patterns import first_matches
from dora_convert.errors import InputError

PATHS = ["model.layers.0.q", "model.layers.1.q", "model.layers.1.k"]


def found(*keys: str) -> dict[str, str]:
    return first_matches(keys, PATHS, where="here")


def test_nothing_to_do() -> None:
    assert found() == {}
    assert first_matches(["q", "a|b"], [], where="here") == {}


def test_first_key_wins_whether_it_is_slow_or_not() -> None:
    assert found("q", "layers.*") == {PATHS[0]: "q", PATHS[1]: "q", PATHS[2]: "layers.*"}
    assert found("layers.*", "q") == dict.fromkeys(PATHS, "layers.*")
    assert found("q|k", "q") == dict.fromkeys(PATHS, "q|k")


names = st.from_regex(r"\A[ab]{1,2}(\.[ab]{1,2}){0,3}\Z")


@given(st.lists(names, max_size=4), st.lists(names, max_size=4))
def test_names_mean_whole_ends(keys: list[str], paths: list[str]) -> None:
    """Without special characters but the dot: the path itself, or an end of it after a dot."""
    matches = first_matches(keys, paths, where="here")
    for path in paths:
        # The dot of a key stands for any character, as in PEFT.
        fitting = [k for k in keys if re.fullmatch(rf"(.*\.)?{k}", path)]
        assert matches.get(path) == (fitting[0] if fitting else None)


def test_simple_names_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(subprocess, "run", refuse)
    assert found("q", r"^model\.layers\.1\.k") == {
        PATHS[0]: "q",
        PATHS[1]: "q",
        PATHS[2]: r"^model\.layers\.1\.k",
    }
    with pytest.raises(AssertionError):
        found("(a|a)")


def test_the_key_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.8)
    with pytest.raises(InputError, match=re.escape("'(b+)+c' takes too long")) as caught:
        first_matches(["a*", "(b+)+c", "d*"], ["b" * 60], where="here")
    assert caught.value.where == ("here",)
    assert caught.value.hint


def test_characters_of_any_kind_reach_the_child() -> None:
    path = "mö.\ud800.q'\"\n"
    assert first_matches(["ö.*\n?"], [path, "mö.ö1"], where="here") == {"mö.ö1": "ö.*\n?"}


def test_child_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment nor the working folder can put code into it."""
    for name in ("json.py", "re.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert found("(?:q|k)") == dict.fromkeys(PATHS, "(?:q|k)")


@pytest.mark.parametrize("key", ["(", "a{99999999999}", "(?P<a>x)(?P<a>y)", "a**", "(" * 5000])
def test_no_regular_expression(key: str) -> None:
    with pytest.raises(InputError, match="is not a regular expression") as caught:
        found("q", key)
    assert len(caught.value.what) < 300


def test_ten_thousand_plain_keys_take_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as an adapter of experts has, each of a rank of its own."""
    monkeypatch.delattr(subprocess, "run")
    paths = [f"model.layers.{i}.mlp.experts.{k}.down_proj" for i in range(40) for k in range(250)]
    keys = [f"^{path}" for path in reversed(paths)]
    assert first_matches(keys, paths, where="here") == {path: f"^{path}" for path in paths}


def test_more_kinds_of_keys_than_are_looked_up() -> None:
    keys = ["a" * n for n in range(1, 400)]
    assert first_matches(keys[::-1], ["a" * 399, "x." + "a" * 30], where="here") == {
        "a" * 399: "a" * 399,
        "x." + "a" * 30: "a" * 30,
    }


def test_expression_that_is_never_compiled() -> None:
    """To compile it takes minutes, and is not done in this process."""
    with pytest.raises(InputError, match="takes too long to match") as caught:
        found("q", "(?i:" + "[\0-\U0010ffff]" * 3000 + ")")
    assert len(caught.value.what) < 300


def test_expression_that_takes_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MEMORY", 64 << 20)
    monkeypatch.setattr(patterns, "_SECONDS", 60)
    with pytest.raises(InputError, match="takes too long to match"):
        found("(?:" + "(a|b)" * 100_000 + ")+")
