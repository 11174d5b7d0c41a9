from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_convert.core.spec.names import NamePattern


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("{module}.lora_a", "model.layers.0.q.lora_a", {"module": "model.layers.0.q"}),
        ("{module}.lora_a", "q.lora_a", {"module": "q"}),
        ("{module}.lora_a", ".lora_a", None),
        ("{module}.lora_a", "q.lora_a.weight", None),
        ("{module}.lora_a", "q.lora_b", None),
        ("a.{module}.b.{module2}", "a.x.y.b.z", {"module": "x.y", "module2": "z"}),
        ("layers.{i}.attn.{p}_proj", "layers.3.attn.q_proj", {"i": "3", "p": "q"}),
        ("layers.{i}.attn.{p}_proj", "layers.3.x.attn.q_proj", None),
        ("layers.{i}", "layers.", None),
        ("{module}.A[.{name}].weight", "q.A.weight", {"module": "q"}),
        ("{module}.A[.{name}].weight", "q.A.default.weight", {"module": "q", "name": "default"}),
        ("{module}.A[.{name}].weight", "q.A.a.b.weight", None),
        ("[wrap.]{module}.m[.weight]", "wrap.q.m.weight", {"module": "wrap.q"}),
        ("a.b+c*", "a.b+c*", {}),
        ("a.b", "axb", None),
        ("{module}", "any thing", {"module": "any thing"}),
    ],
)
def test_match(pattern: str, name: str, found: dict[str, str] | None) -> None:
    matched = NamePattern.parse(pattern).match(name)
    known = None if matched is None else {k: v for k, v in matched.items() if v is not None}
    assert known == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "printable"),
        ("a\nb", "printable"),
        ("x" * 501, "printable"),
        ("{}", "'{}' is no placeholder"),
        ("{1a}", "is no placeholder"),
        ("{a b}", "without its other half"),
        ("a}", "'}' without its other half"),
        ("{a", "'{' without its other half"),
        ("[a", "brackets that do not pair up"),
        ("a]", "brackets that do not pair up"),
        ("[a[b]]", "brackets that do not pair up"),
        ("{a}.{a}", "{a} comes twice"),
        ("{module}.x.{module}", "{module} comes twice"),
        ("{a}{b}", "{b} needs a dot"),
        ("{a}_{b}", "{b} needs a dot"),
        ("{a}[.]{b}", "{b} needs a dot"),
        ("[a].[b].[c].[d].[e]", "more than 4 optional parts"),
    ],
)
def test_what_is_no_pattern(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        NamePattern.parse(text)


def test_fill() -> None:
    pattern = NamePattern.parse("{module}.A[.{name}].{i}")
    assert pattern.required == {"module", "i"}
    assert pattern.is_optional
    assert pattern.fill({"module": "a.b", "i": "3", "name": "x"}) == "a.b.A.3"
    assert pattern.fill({"module": "a.b"}) is None
    assert not NamePattern.parse("{module}").is_optional


PIECE = st.text("abz019_-+*()|\\^$?", min_size=1, max_size=6)


@given(st.lists(st.one_of(PIECE, st.just(None)), min_size=1, max_size=6), st.data())
def test_what_is_filled_in_is_found_again(pieces: list[str | None], data: st.DataObject) -> None:
    """A pattern of whole pieces, each a literal or a placeholder, in which one may be a path."""
    fields = [i for i, piece in enumerate(pieces) if piece is None]
    long = data.draw(st.sampled_from([None, *fields]))
    text = ".".join(
        piece if piece is not None else "{module}" if i == long else f"{{f{i}}}"
        for i, piece in enumerate(pieces)
    )
    values = {f"f{i}": data.draw(PIECE) for i in fields if i != long}
    if long is not None:
        values["module"] = ".".join(data.draw(st.lists(PIECE, min_size=1, max_size=3)))
    pattern = NamePattern.parse(text)
    name = pattern.fill(values)
    assert name is not None
    assert pattern.match(name) == values


def test_no_name_makes_a_pattern_hang() -> None:
    """A million dots: what tries again from each of them would not come back in a day."""
    pattern = NamePattern.parse("[a.]{module}.{b}x.{c}[.{d}].{e}y[.z]")
    assert pattern.match("a." * 100_000) is None
    assert pattern.match("ax" * 100_000) is None
    assert pattern.match("a.bx.c.d.ey" + ".x" * 100_000) is None
