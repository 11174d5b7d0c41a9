"""What a description makes of names, shapes and configs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dora_convert.core.adapter import (
    Adapter,
    BiasRule,
    LayerKind,
    MagnitudeAxis,
    MagnitudeKind,
    RowOrder,
)
from dora_convert.core.tensors import DType, Permuted, TensorRef
from dora_convert.errors import InputError

from .described import TENSORS, described, files, layer
from .values import ref

SCALED = f"scale = 2.0\n{TENSORS}"
OPEN = SCALED.replace('{ name = "{module}.m", shape = ["out"] }', '"{module}.m"')


def read(text: str, tensors: dict[str, TensorRef], config: Any = None, **others: Any) -> Adapter:
    return described(text).read(files(tensors, config), **others)


def problems(text: str, tensors: dict[str, TensorRef], config: Any = None, **others: Any) -> Any:
    with pytest.raises(InputError) as caught:
        read(text, tensors, config, **others)
    assert "read as mine" in caught.value.where[1]
    return list(caught.value.problems)


def only_problem(text: str, tensors: dict[str, TensorRef], config: Any = None) -> str:
    (problem,) = problems(text, tensors, config)
    return str(problem)


def test_module() -> None:
    found = read(SCALED, layer())
    module = found.modules["x.q"]
    assert module.delta is not None
    assert (module.delta.shape, module.delta.rank) == ((6, 10), 4)
    assert module.delta.down.view == ()
    assert module.magnitude is not None
    assert (module.axis, module.scaling, module.kind) == (MagnitudeAxis.OUT, 2.0, LayerKind.LINEAR)
    assert (module.bias_rule, module.magnitude_is) == (BiasRule.KEEP, MagnitudeKind.NORM)
    assert (found.format, found.is_axis_open, found.is_scaling_open) == ("mine", False, False)


def test_transposed_factors() -> None:
    text = SCALED.replace(
        '"{module}.a"', '{ name = "{module}.a", shape = ["in", "rank"] }'
    ).replace('"{module}.b"', '{ name = "{module}.b", shape = ["rank", "out"] }')
    tensors = layer() | {"x.q.a": ref("x.q.a", 10, 4), "x.q.b": ref("x.q.b", 4, 6)}
    delta = read(text, tensors).modules["x.q"].delta
    assert delta is not None
    assert delta.shape == (6, 10)
    assert delta.down.view == delta.up.view == (Permuted((1, 0)),)


def test_bias_rule_and_kind_of_the_magnitude() -> None:
    text = SCALED.replace('"{module}.m",', '"{module}.m", values = "factor",')
    module = read(f'bias = "scaled"\n{text}', layer()).modules["x.q"]
    assert (module.bias_rule, module.magnitude_is) == (BiasRule.SCALED, MagnitudeKind.FACTOR)


def test_prefixes_renames_and_row_orders() -> None:
    text = f"""prefix = ["p.", "q."]
{SCALED}
[rename]
"l.{{i}}.out" = "layers.{{i}}.o_proj"
"l.{{i}}.{{p}}" = "layers.{{i}}.{{p}}_proj"
[[rows]]
modules = "{{module}}.q_proj"
magnitude = "interleaved"
"""
    tensors = layer("p.l.0.q") | layer("q.l.1.out") | layer("p.head")
    found = read(text, tensors).modules
    assert list(found) == ["head", "layers.0.q_proj", "layers.1.o_proj"]
    rotated = found["layers.0.q_proj"]
    assert (rotated.up_order, rotated.magnitude_order) == (RowOrder.SAME, RowOrder.INTERLEAVED)
    assert found["head"].up_order is RowOrder.SAME


def test_one_module_under_two_names() -> None:
    text = f'prefix = ["p."]\n{SCALED}'
    told = problems(text, layer("p.x") | layer("x"))
    assert told[0] == "p.x.a and x.a are the same tensor (down)"
    assert len(told) == 3


def test_embedding() -> None:
    text = SCALED + TENSORS.replace("[tensors]", '[embedding]\nmodules = "{module}.emb"')
    found = read(text, layer("m.emb", 20, 6) | layer("m.q")).modules
    assert found["m.emb"].kind is LayerKind.EMBEDDING
    assert found["m.emb"].axis is MagnitudeAxis.OUT
    assert found["m.q"].kind is LayerKind.LINEAR


def test_axis_of_an_embedding_is_the_descriptions() -> None:
    text = OPEN + TENSORS.replace("[tensors]", '[embedding]\nmodules = "emb"').replace(
        '["out"]', '["in"]'
    )
    tensors = layer("emb", 20, 6) | {"emb.m": ref("emb.m", 6)} | layer("q", 6, 6)
    found = read(text, tensors)
    assert found.is_axis_open
    assert found.modules["emb"].axis is MagnitudeAxis.IN
    given = read(text, tensors, axis=MagnitudeAxis.OUT)
    assert not given.is_axis_open
    assert {p: m.axis.value for p, m in given.modules.items()} == {"emb": "in", "q": "out"}


def test_open_axis() -> None:
    assert read(OPEN, layer("q", 6, 6)).is_axis_open
    wide = layer("w") | {"w.m": ref("w.m", 1, 10)}
    found = read(OPEN, wide | layer("q", 6, 6))
    assert not found.is_axis_open
    assert {m.axis for m in found.modules.values()} == {MagnitudeAxis.IN}
    assert "--axis" in problems(OPEN, wide | layer("v"))[0]
    assert "expected 6 or 10" in only_problem(OPEN, layer() | {"x.q.m": ref("x.q.m", 7)})


@pytest.mark.parametrize("shape", [(6, 1), (1, 6), (10,), (6, 2)])
def test_magnitude_of_another_shape(shape: tuple[int, ...]) -> None:
    told = only_problem(SCALED, layer() | {"x.q.m": ref("x.q.m", *shape)})
    assert f"the magnitude is {list(shape)}, expected [6]" in told or "entries, expected 6" in told


def test_axis_that_the_user_gives() -> None:
    tensors = layer() | {"x.q.m": ref("x.q.m", 1, 10)}
    assert read(SCALED, tensors, axis=MagnitudeAxis.IN).modules["x.q"].axis is MagnitudeAxis.IN


def test_magnitude_only() -> None:
    alone = {"x.m": ref("x.m", 6)}
    told = problems(SCALED, alone)
    assert told == ["x: x.a is missing (there is x.m)", "x: x.b is missing (there is x.m)"]
    module = read(f"magnitude_only = true\n{SCALED}", alone).modules["x"]
    assert (module.delta, module.scaling) == (None, 1.0)
    half = layer()
    del half["x.q.b"]
    assert "x.q.b is missing" in only_problem(f"magnitude_only = true\n{SCALED}", half)


def test_what_is_missing_goes_by_its_name_in_the_file() -> None:
    tensors = layer("l.0.q") | layer("l.1.q")
    del tensors["l.1.q.m"]
    text = SCALED + '[rename]\n"l.{i}.q" = "layers.{i}.q_proj"'
    assert only_problem(text, tensors) == "layers.1.q_proj: l.1.q.m is missing"


DECLARED = f'config = "c.json"\ndeclares_dora = [{{ kind = "dora" }}]\n{SCALED}'


def test_plain_lora_and_what_the_config_says() -> None:
    plain = {name: t for name, t in layer().items() if not name.endswith("m")}
    assert "none of the 1 modules has a magnitude" in only_problem(SCALED, plain)
    allowed = f"plain = true\n{DECLARED}"
    assert "says that this is a DoRA" in only_problem(allowed, plain, {"kind": "dora"})
    found = read(allowed, plain, {"kind": "lora"})
    assert found.modules["x.q"].magnitude is None
    assert "plain LoRA" in found.notes[0]
    assert "taken as one" in read(DECLARED, layer(), {"kind": "lora"}).notes[0]
    assert read(DECLARED, layer(), {"kind": "dora"}).notes == ()


def test_tensors_that_are_no_part_of_a_module() -> None:
    extra = {n: ref(n, 6) for n in ("norm.weight", "x.inv_freq", "x.q.bias", "y.bias")}
    text = f'replaced = "norm.{{module}}"\nignore = "{{module}}.inv_freq"\n{SCALED}'
    text += 'bias = "{module}.bias"\n'
    assert only_problem(text, layer() | extra) == "y.bias [6] is not understood"
    del extra["y.bias"]
    found = read(text, layer() | extra)
    assert found.replaced.keys() == {"norm.weight", "x.q.bias"}
    held = layer() | {"norm.weight": ref("norm.weight", 6, dtype=DType.I8)}
    assert "is no weight" in only_problem(text, held)


def test_renames_apply_to_whole_tensors_too() -> None:
    text = f'replaced = "{{module}}"\n{SCALED}[rename]\n"a" = "b"'
    assert list(read(text, layer() | {"a.weight": ref("a.weight", 6)}).replaced) == ["b.weight"]


def test_copy_of_the_base() -> None:
    text = SCALED + 'weight = { name = "{module}.w", shape = ["in", "out"] }\n'
    module = read(text, layer() | {"x.q.w": ref("x.q.w", 10, 6)}).modules["x.q"]
    assert module.weight is not None
    assert module.weight.spec.shape == (6, 10)
    told = only_problem(text, layer() | {"x.q.w": ref("x.q.w", 6, 10)})
    assert "its own copy of the base is [10, 6], the update [6, 10]" in told


def test_nothing_in_it() -> None:
    assert "holds no DoRA module" in problems(SCALED, {})[-1]


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (ref("x.q.a", 0), "ZeRO-3"),
        (ref("x.q.a", 4, 10, dtype=DType.I8), "is I8, not a float"),
        (ref("x.q.a", 40), "expected two matrices"),
        (ref("x.q.b", 6, 3), "the ranks disagree"),
        (ref("x.q.m", 6, dtype=DType.U8), "is U8, not a float"),
    ],
)
def test_tensors_that_cannot_be(tensor: TensorRef, told: str) -> None:
    assert told in only_problem(SCALED, layer() | {tensor.spec.name: tensor})


# Scaling


def scaled(scale: str) -> str:
    return f'config = "c.json"\nscale = {scale}\n{TENSORS}'


@pytest.mark.parametrize(
    ("scale", "config", "scaling"),
    [
        ('"a.b"', {"a": {"b": 3}}, 3.0),
        ('"a.b"', {"a.b": 3.5}, 3.5),
        ('{ alpha = "al", rank = "r" }', {"al": 12, "r": 4}, 3.0),
        ('{ alpha = "al" }', {"al": 12}, 3.0),
        ("{ alpha = 8, rank = 2 }", {}, 4.0),
        ('{ alpha = "al", rank = "r", rslora = "rs" }', {"al": 12, "r": 4, "rs": True}, 6.0),
        ('{ alpha = "al", rank = "r", rslora = "rs" }', {"al": 12, "r": 4}, 3.0),
        ('{ value = "s", alpha = "al" }', {"s": 10, "al": 12}, 30.0),
        ('["s", "t"]', {"t": 5}, 5.0),
        ('["s", "t"]', {"s": 2, "t": 5}, 2.0),
        ('["s", 1.5]', {}, 1.5),
    ],
)
def test_scaling(scale: str, config: Any, scaling: float) -> None:
    text = scaled(scale)
    if scale == "{ alpha = 8, rank = 2 }":
        assert "by the config, 4 by the tensors" in only_problem(text, layer(), config)
        tensors = layer(rank=2)
    else:
        tensors = layer()
    assert read(text, tensors, config).modules["x.q"].scaling == scaling


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "c.json is missing: it holds the scaling ('s' or 'al' and 'r')"),
        ({}, "c.json: 's' or 'al' and 'r' is missing: it holds the scaling"),
        ({"s": None, "al": 3}, "c.json: 's' or 'al' and 'r' is missing: it holds the scaling"),
        ({"s": "x"}, "c.json: 's' must be a finite number, not 'x'"),
        ({"s": math.inf}, "c.json: 's' must be a finite number, not inf"),
        ({"al": 3, "r": 0}, "c.json: 'r' must be a whole number of at least 1, not 0"),
        ({"al": 3, "r": 8}, "x.q: the rank is 8 by the config, 4 by the tensors"),
    ],
)
def test_config_without_a_scaling(config: Any, told: str) -> None:
    found = problems(scaled('["s", { alpha = "al", rank = "r" }]'), layer(), config)
    assert told in found


def test_magnitudes_alone_need_no_scaling() -> None:
    text = "magnitude_only = true\n" + scaled('"s"')
    assert read(text, {"x.m": ref("x.m", 6)}).modules["x"].scaling == 1.0


def test_scaling_that_is_not_saved() -> None:
    assert read(TENSORS, layer()).is_scaling_open
    assert not read(f"magnitude_only = true\n{TENSORS}", {"x.m": ref("x.m", 6)}).is_scaling_open


def test_alpha_in_a_tensor() -> None:
    text = TENSORS + 'alpha = "{module}.alpha"'
    tensors = layer() | {"x.q.alpha": ref("x.q.alpha")}
    found = described(text).read(files(tensors, None, x_q_alpha=2.0))
    assert found.modules["x.q"].scaling == 0.5
    assert not found.is_scaling_open
    assert "x.q.alpha [] is not one finite number" in only_problem(text, tensors)
    assert read(text, layer()).modules["x.q"].scaling == 1.0


# Recognition and refusal


def test_detect() -> None:
    plain = {name: t for name, t in layer().items() if not name.endswith("m")}
    assert described(SCALED).detect(files(layer()))
    assert not described(SCALED).detect(files(plain))
    text = f"""config = "c.json"
{SCALED}
[detect]
names = ["{{module}}.a"]
config = {{ kind.name = "x", on = true }}
[detect.unless]
config.old = 1
"""
    config = {"kind": {"name": "x"}, "on": True}
    assert described(text).detect(files(plain, config))
    assert described(text).detect(files(plain, {**config, "old": True}))  # not 1
    assert not described(text).detect(files(plain, {**config, "old": 1}))
    assert not described(text).detect(files(plain, {**config, "on": 1}))
    assert not described(text).detect(files(plain, {"kind": "x", "on": True}))
    assert not described(text).detect(files(plain))
    assert not described(text).detect(files({}, config))


def test_refuse() -> None:
    text = f"""config = "c.json"
{SCALED}
[[refuse]]
why = "version 0"
config.version = 0
[[refuse]]
why = "per input"
magnitude = [1, "in"]
[[refuse]]
why = "experts"
names = "{{module}}.experts.{{i}}.a"
"""
    assert read(text, layer(), {"version": 1}).modules
    assert "version 0" in problems(text, layer(), {"version": 0})
    assert "per input" in problems(text, layer() | {"x.q.m": ref("x.q.m", 1, 10)})
    assert "experts" in problems(text, layer("x.experts.3"))


def test_refused_shape_that_is_the_right_one_too() -> None:
    """[1, 6] of a square weight is what both say: then it is not refused."""
    text = SCALED.replace('["out"]', '[1, "in"]')
    text += '[[refuse]]\nwhy = "no"\nmagnitude = [1, "out"]'
    square = layer(out=6, inner=6) | {"x.q.m": ref("x.q.m", 1, 6)}
    assert read(text, square).modules
    assert "no" in problems(text, layer() | {"x.q.m": ref("x.q.m", 1, 6)})


def test_note() -> None:
    assert read(f'note = "mind the gap"\n{SCALED}', layer()).notes == ("mind the gap",)


def test_base_model() -> None:
    text = f'config = "c.json"\nbase_model = "m.name"\n{SCALED}'
    assert read(text, layer(), {"m": {"name": "llama"}}).base_model == "llama"
    assert read(text, layer(), {}).base_model is None
    assert "'m.name' must be a string" in only_problem(text, layer(), {"m": {"name": 3}})
