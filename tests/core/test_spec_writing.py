"""Adapters in a described layout, and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_convert.core.adapter import (
    Adapter,
    BiasRule,
    LayerKind,
    MagnitudeAxis,
    MagnitudeKind,
    RowOrder,
    TokenRows,
)
from dora_convert.core.bundle import Bundle
from dora_convert.core.tensors import Permuted, Reshaped, TensorRef
from dora_convert.errors import InputError

from .described import TENSORS, described, files, layer
from .values import adapter, dora, magnitude_only, ref

SCALED = f"scale = 2.0\n{TENSORS}"  # as the modules of `dora` have it
EMBEDDING = TENSORS.replace("[tensors]", '[embedding]\nmodules = "emb"')


def refused(text: str, held: Adapter) -> list[str]:
    with pytest.raises(InputError, match=r"cannot be written as mine") as caught:
        described(text).write(held)
    return list(caught.value.problems)


def only_refused(text: str, held: Adapter) -> str:
    (problem,) = refused(text, held)
    return problem


def shapes(made: Bundle) -> dict[str, tuple[int, ...]]:
    return {name: t.spec.shape for name, t in made.tensors.items()}


def test_names_and_shapes() -> None:
    text = """prefix = ["p.", ""]
scale = 2.0
replaced = "norm.{module}"
[tensors]
down = { name = "{module}.a[.{adapter}]", shape = ["in", "rank"] }
up = { name = "{module}.b", shape = ["rank", "out"] }
magnitude = { name = "{module}.m", shape = ["out", 1] }
weight = "{module}.w"
bias = "{module}.bias"
[rename]
"l.{i}.{p}" = "layers.{i}.{p}_proj"
"""
    weight = ref("w", 6, 10)
    held = adapter(
        dora("layers.0.q_proj", 6, 10, weight=weight),
        dora("head", 6, 10),
        replaced={"norm.weight": ref("n", 6), "head.bias": ref("hb", 6)},
    )
    made = described(text).write(held)
    assert shapes(made) == {
        "p.l.0.q.a": (10, 4),
        "p.l.0.q.b": (4, 6),
        "p.l.0.q.m": (6, 1),
        "p.l.0.q.w": (6, 10),
        "p.head.a": (10, 4),
        "p.head.b": (4, 6),
        "p.head.m": (6, 1),
        "p.norm.weight": (6,),
        "p.head.bias": (6,),
    }
    down = made.tensors["p.l.0.q.a"]
    assert down.stored.name == "layers.0.q_proj.A"
    assert down.spec.name == "p.l.0.q.a"
    assert down.view == (Permuted((1, 0)),)
    assert made.tensors["p.head.m"].view == (Reshaped((6, 1)),)
    assert made.documents == {}


@pytest.mark.parametrize(
    ("text", "held", "told"),
    [
        (SCALED, adapter(magnitude_only("x", 6)), "x: a magnitude without factors"),
        (SCALED, adapter(dora("x", 6, 10, magnitude=False)), "x: factors without a magnitude"),
        (SCALED, adapter(dora("x", 6, 10, axis=MagnitudeAxis.IN)), "x: a magnitude per input"),
        (SCALED, adapter(dora("x", 6, 10, weight=ref("w", 6, 10))), "x: a copy of its base weight"),
        (SCALED, adapter(dora("x", 6, 10), replaced={"n": ref("n", 6)}), "n: a tensor that was"),
        (
            SCALED,
            adapter(dora("x", 6, 10), token_rows={"e": TokenRows((1,), ref("r", 1, 6))}),
            "e: rows of tokens that were trained",
        ),
        (SCALED, adapter(dora("x", 6, 10), is_axis_open=True), "what the magnitudes belong to"),
        (
            SCALED,
            adapter(replace(dora("x", 6, 10), kind=LayerKind.EMBEDDING)),
            "x: an adapted embedding",
        ),
        (
            SCALED,
            adapter(replace(dora("x", 6, 10), bias_rule=BiasRule.SCALED)),
            "x: a bias that is scaled with the row, where this layout's is kept",
        ),
        (
            SCALED,
            adapter(replace(dora("x", 6, 10), magnitude_is=MagnitudeKind.FACTOR)),
            "x: a magnitude whose values are not m",
        ),
        (
            SCALED,
            adapter(replace(dora("x", 6, 10), up_order=RowOrder.HALVED)),
            "x: rows in another order than the base's",
        ),
        (
            SCALED,
            adapter(replace(dora("x", 6, 10), scaling=3.0)),
            "x: its scaling is 3, where this layout's is 2",
        ),
        (TENSORS, adapter(dora("x", 6, 10)), "the scaling is not saved in this layout"),
        (
            TENSORS + 'alpha = "{module}.alpha"',
            adapter(dora("x", 6, 10)),
            "x: its scaling is 2, and alpha tensors are not written",
        ),
        (
            f'config = "c.json"\nscale = "s"\n{TENSORS}',
            adapter(dora("x", 6, 10)),
            "the scaling is in a config, and no [write] says how that is written",
        ),
        (
            SCALED.replace("{module}.a", "{module}.{name}.a"),
            adapter(dora("x", 6, 10)),
            "a name of this layout is not known in full: {module}.{name}.a",
        ),
        (
            SCALED + '[rename]\n"{i}.x" = "{i}.y"',
            adapter(dora("0.x", 6, 10)),
            "0.x: no name in this layout becomes that path",
        ),
        (
            SCALED + '[rename]\n"{i}.{j}" = "{i}.y"',
            adapter(dora("0.y", 6, 10)),
            None,
        ),
        (
            f"replaced = '{{module}}'\n{SCALED}[rename]\n'{{i}}.x' = '{{i}}.y'",
            adapter(dora("0.z", 6, 10), replaced={"0.x.weight": ref("n", 6)}),
            "0.x.weight: no name in this layout becomes that path",
        ),
        (SCALED + EMBEDDING, adapter(dora("emb", 6, 10)), "emb: an adapted linear, which here is"),
        (
            SCALED + EMBEDDING,
            adapter(replace(dora("emb", 6, 10, axis=MagnitudeAxis.IN), kind=LayerKind.EMBEDDING)),
            "emb: a magnitude per input",
        ),
        (
            SCALED + '[[rows]]\nmodules = "x"\nmagnitude = "interleaved"',
            adapter(dora("x", 6, 10)),
            "x: its rows are in another order than this layout's",
        ),
        (
            f"replaced = '{{module}}'\n{SCALED}",
            adapter(dora("x", 6, 10), replaced={"x.a": ref("n", 6)}),
            "two tensors would be called x.a",
        ),
        (
            f"replaced = '{{module}}'\n{SCALED}",
            adapter(dora("x", 6, 10), replaced={"y.a": ref("n", 6)}),
            "it would be read back with errors: y: y.b is missing",
        ),
        (
            f"replaced = '{{module}}'\nprefix = ['p.', 'p.q.']\n{SCALED}",
            adapter(dora("q.x", 6, 10)),
            None,
        ),
        (
            f"replaced = '{{module}}'\nprefix = ['p.', 'q.']\n{SCALED}",
            adapter(dora("q.x", 6, 10)),
            None,
        ),
        (
            f"prefix = ['', 'q.']\n{SCALED}",
            adapter(dora("q.x", 6, 10)),
            "q.x: would not be read back as it is",
        ),
    ],
)
def test_what_a_layout_cannot_hold(text: str, held: Adapter, told: str | None) -> None:
    if told is None:
        assert described(text).write(held).tensors
        return
    found = refused(text, held)
    assert any(problem.startswith(told) for problem in found), found


def test_everything_at_once() -> None:
    held = adapter(
        magnitude_only("a", 6), replace(dora("b", 6, 10), scaling=3.0), replaced={"n": ref("n", 6)}
    )
    assert len(refused(SCALED, held)) == 3


CONFIG = f"""config = "c.json"
base_model = "base.name"
scale = {{ alpha = "lora.alpha", rank = "lora.rank" }}
{TENSORS}
[write]
kind = "dora"
version = 3
base.name = "{{base_model}}"
lora = {{ rank = "{{rank}}", alpha = "{{alpha}}", scale = "{{scale}}", paths = "{{modules}}" }}
leaves = "{{leaves}}"
[rename]
"l.{{i}}" = "layers.{{i}}"
"""


def test_config() -> None:
    held = adapter(dora("layers.1", 6, 10), dora("layers.0", 6, 10), base_model="llama")
    made = described(CONFIG).write(held)
    assert made.documents["c.json"] == {
        "kind": "dora",
        "version": 3,
        "base": {"name": "llama"},
        "lora": {"rank": 4, "alpha": 8, "scale": 2.0, "paths": ["l.0", "l.1"]},
        "leaves": ["0", "1"],
    }
    assert json.loads(json.dumps(made.documents["c.json"])) == made.documents["c.json"]
    assert described(CONFIG).read(made).base_model == "llama"


def test_what_is_not_known_is_left_out_of_the_config() -> None:
    text = f"magnitude_only = true\n{CONFIG}"
    made = described(text).write(adapter(magnitude_only("x", 6)))
    assert made.documents["c.json"]["base"] == {}
    assert made.documents["c.json"]["lora"] == {"paths": ["x"]}


def test_one_rank_for_all() -> None:
    held = adapter(dora("a", 6, 10), dora("b", 6, 10, rank=2))
    assert "it has one rank for all modules, here are 2 (2, 4)" in refused(CONFIG, held)
    held = adapter(dora("a", 6, 10), replace(dora("b", 6, 10), scaling=3.0))
    assert "it has one alpha for all modules, here are 2 (8, 12)" in refused(CONFIG, held)


@pytest.mark.parametrize("scaling", [1 / 3, 0.1, 20.0, 2.5e-7, 1e9 / 7])
@pytest.mark.parametrize("rank", [1, 3, 7, 64])
def test_scalings_come_back_to_the_last_bit(scaling: float, rank: int) -> None:
    held = adapter(replace(dora("x", 6, 10, rank=rank), scaling=scaling))
    again = described(CONFIG).read(described(CONFIG).write(held))
    # Three tenths over three is no double that equals a tenth.
    assert math.isclose(again.modules["x"].scaling, scaling, rel_tol=2.3e-16)


# Random layouts

WORD = st.text("abcdefgh", min_size=1, max_size=4)
SCALES = ['"s"', '{ alpha = "a" }', '{ value = "s", rank = "r", alpha = 1 }']
MAGNITUDES = ['["out"]', '["out", 1]', '[1, "out"]', '["in"]', '["in", 1]', '[1, "in"]']


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """A layout whose names are all different."""
    names = draw(st.lists(WORD, min_size=5, max_size=5, unique=True))
    parts = [
        f"{{module}}.{name}" + draw(st.sampled_from(["", "[.{n}]", ".weight"])) for name in names
    ]
    down = draw(st.sampled_from(['["rank", "in"]', '["in", "rank"]']))
    up = draw(st.sampled_from(['["out", "rank"]', '["rank", "out"]']))
    values = draw(st.sampled_from(["norm", "factor"]))
    lines = [
        f'prefix = "{draw(st.sampled_from(["", "base.", "zz.z."]))}"',
        f'bias = "{draw(st.sampled_from(["keep", "scaled"]))}"',
        'config = "c.json"',
        f"scale = {draw(st.sampled_from(SCALES))}",
        "[tensors]",
        f'down = {{ name = "{parts[0]}", shape = {down} }}',
        f'up = {{ name = "{parts[1]}", shape = {up} }}',
        f'magnitude = {{ name = "{parts[2]}", shape = {draw(st.sampled_from(MAGNITUDES))}, '
        f'values = "{values}" }}',
        f'weight = {{ name = "{parts[3]}", shape = ["in", "out"] }}',
        f'bias = "{parts[4]}"',
        "[rename]",
        '"l.{i}.{p}_x" = "layers.{i}.{p}_proj"',
        '"t.{module}" = "model.{module}"',
        "[write]",
    ]
    scale = next(line for line in lines if line.startswith("scale"))
    if "value" in scale:
        lines += ['s = "{alpha}"', 'r = "{rank}"']
    else:
        lines += ['s = "{scale}"', 'a = "{alpha}"']
    return "\n".join(lines)


@st.composite
def adapters(draw: st.DrawFn, text: str) -> Adapter:
    """An adapter that the layout can hold."""
    axis = MagnitudeAxis.OUT if '"out"' in _line(text, "magnitude") else MagnitudeAxis.IN
    rank, scaling = draw(st.integers(1, 3)), draw(st.floats(0.01, 100))
    paths = st.sampled_from(["layers.0.q_proj", "layers.1.o_proj", "model.x.y", "head", "m.n"])
    modules = []
    for path in draw(st.lists(paths, min_size=1, max_size=4, unique=True)):
        out, inner = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        weight = ref("w", out, inner) if draw(st.booleans()) else None
        module = dora(path, out, inner, rank=rank, axis=axis, weight=weight)
        modules.append(
            replace(
                module,
                scaling=scaling,
                bias_rule=BiasRule(_line(text, "bias").split('"')[1]),
                magnitude_is=MagnitudeKind(_line(text, "magnitude").split('"')[-2]),
            )
        )
    with_bias = draw(st.sets(st.sampled_from([m.path for m in modules])))
    return adapter(*modules, replaced={f"{path}.bias": ref("b", 3) for path in with_bias})


def _line(text: str, key: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"{key} ="))


def content(ref: TensorRef | None) -> Any:
    """What must come back: the source, the shape, and how often the axes are swapped."""
    if ref is None:
        return None
    swaps = sum(isinstance(step, Permuted) for step in ref.view)
    return ref.source, ref.stored, ref.spec.shape, ref.spec.dtype, swaps


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip_of_random_layouts(data: st.DataObject) -> None:
    text = data.draw(layouts())
    held = data.draw(adapters(text))
    mine = described(text)
    made = mine.write(held)
    assert mine.detect(made)
    again = mine.read(made)
    assert again.modules.keys() == held.modules.keys()
    assert {n: content(t) for n, t in again.replaced.items()} == {
        n: content(t) for n, t in held.replaced.items()
    }
    for path, module in held.modules.items():
        back = again.modules[path]
        assert module.delta is not None
        assert back.delta is not None
        assert content(back.delta.down) == content(module.delta.down)
        assert content(back.delta.up) == content(module.delta.up)
        assert content(back.magnitude) == content(module.magnitude)
        assert content(back.weight) == content(module.weight)
        assert math.isclose(back.scaling, module.scaling, rel_tol=2.3e-16)
        assert (back.axis, back.bias_rule, back.magnitude_is) == (
            module.axis,
            module.bias_rule,
            module.magnitude_is,
        )
    assert mine.write(again).tensors.keys() == made.tensors.keys()


@pytest.mark.parametrize("axis", MagnitudeAxis)
def test_magnitude_of_no_declared_shape(axis: MagnitudeAxis) -> None:
    """Either axis is written; of a square weight it must be said again in reading."""
    mine = described(SCALED.replace('{ name = "{module}.m", shape = ["out"] }', '"{module}.m"'))
    wide, square = dora("w", 6, 10, axis=axis), dora("s", 6, 6, axis=axis)
    assert mine.read(mine.write(adapter(wide, square))).modules["s"].axis is axis
    alone = mine.write(adapter(square))
    assert mine.read(alone).is_axis_open
    assert mine.read(alone, axis=axis).modules["s"].axis is axis


def test_rows_in_the_order_of_the_layout() -> None:
    mine = described(SCALED + '[[rows]]\nmodules = "{module}.q"\nmagnitude = "interleaved"')
    found = mine.read(files(layer("x.q") | layer("x.v")))
    assert found.modules["x.q"].magnitude_order is RowOrder.INTERLEAVED
    assert mine.write(found).tensors == layer("x.q") | layer("x.v")


def test_its_own_files_are_written_as_they_were() -> None:
    text = f"replaced = '{{module}}'\n{SCALED}"
    tensors = layer("a.b") | layer("c") | {"n.weight": ref("n.weight", 3)}
    mine = described(text)
    made = mine.write(mine.read(files(tensors)))
    assert made.tensors == tensors
