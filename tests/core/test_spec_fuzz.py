"""Descriptions that are broken at random: understood or refused, and nothing else."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dora_convert.core.spec.format import SpecFormat
from dora_convert.core.spec.parsing import parse
from dora_convert.errors import InputError
from dora_convert.formats import example_spec

from .described import files, layer

LINES = [line for line in example_spec().splitlines() if line and not line.startswith("#")]
VALUES = st.recursive(
    st.sampled_from(
        [
            *(
                "0",
                "1",
                "-1",
                "1.5",
                "1e400",
                "nan",
                "inf",
                "true",
                "false",
                "99999999999999999999",
            ),
            *('""', '"{module}"', '"{module}.a"', '"[{x}]"', '"{"', '"lora.alpha"', '"{rank}"'),
            *('"out"', '"rank"', '"a/b"', "2020-01-01", "12:00:00", '"""\nx\n"""'),
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(
            st.sampled_from(["name", "shape", "values", "alpha", "rank", "names", "why", "x"]),
            inner,
            max_size=3,
        ).map(lambda items: "{" + ", ".join(f"{k} = {v}" for k, v in items.items()) + "}")
    ),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_one_value_is_another(data: st.DataObject) -> None:
    at = data.draw(st.sampled_from([i for i, line in enumerate(LINES) if " = " in line]))
    key = LINES[at].partition(" = ")[0]
    check("\n".join([*LINES[:at], f"{key} = {data.draw(VALUES)}", *LINES[at + 1 :]]))


@given(st.integers(0, len(LINES)), st.integers(0, len(LINES)))
@settings(max_examples=100, deadline=None)
@example(0, 0)
def test_a_part_of_it(first: int, last: int) -> None:
    check("\n".join(LINES[first:last]))
    check("\n".join(LINES[:first] + LINES[last:]))


def check(text: str) -> None:
    spec, fault = None, None
    try:
        spec = parse(text, name="mine", file="mine.toml")
    except InputError as error:
        fault = error
    if spec is None:
        assert fault is not None
        assert fault.problems or "is not valid TOML" in fault.what
        assert all(re.match(r"line \d+: \S", problem) for problem in fault.problems)
        return
    mine = SpecFormat(spec)
    config: Any = {"lora": {"alpha": 8, "rank": 4}}
    held = files(layer("model.layers.0.q_proj"), config)
    mine.detect(held)
    with contextlib.suppress(InputError):
        mine.write(mine.read(held))


@pytest.mark.parametrize(
    "text",
    [
        f"[{'.'.join(['a'] * 30_000)}]",
        f"{'.'.join(['a'] * 30_000)} = 1",
        f"a = {{{'.'.join(['a'] * 3000)} = 1}}",
        ".".join(["'a'", '"b"'] * 3000) + " = 1",
        "[write]\n" + ".".join(["a"] * 3000) + " = 1",
        "[write]\na = " + "{a = " * 230 + "1" + "}" * 230,
        "[write]\na = " + "[" * 20_000 + "]" * 20_000,
    ],
    ids=["header", "key", "inline", "quoted", "written", "tables", "lists"],
)
def test_deep_nesting(text: str) -> None:
    """In little time and memory, whatever of it the standard parser would take."""
    with pytest.raises(InputError, match=r"nested too deeply|is wrong"):
        parse(text, name="mine", file="mine.toml")


def test_dots_that_are_no_nesting() -> None:
    dots = "." * 100
    text = example_spec() + f"# {dots}\n"
    parse(text.replace('title = "', f'title = "{dots}'), name="mine", file="mine.toml")
