"""Descriptions: what they mean, and what is said of mistakes."""

from __future__ import annotations

import pytest

from dora_convert.core.adapter import BiasRule, MagnitudeAxis, MagnitudeKind, RowOrder
from dora_convert.core.spec.parsing import parse
from dora_convert.core.spec.values import Scale, Spec
from dora_convert.errors import InputError
from dora_convert.formats import example_spec

TENSORS = """\
[tensors]
down = "{module}.a"
up = "{module}.b"
magnitude = "{module}.m"
"""


def parsed(text: str) -> Spec:
    return parse(text, name="mine", file="mine.toml")


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        parsed(text)
    assert caught.value.where == ("mine.toml",)
    assert "--example-spec" in caught.value.hint
    return caught.value.problems


def test_the_least_that_is_needed() -> None:
    spec = parsed(TENSORS)
    assert (spec.name, spec.title) == ("mine", "mine")
    assert spec.weights == "adapter_model.safetensors"
    assert spec.files == (spec.weights,)
    assert (spec.config, spec.document, spec.embedding) == (None, None, None)
    assert spec.linear.down.shape == ("rank", "in")
    assert spec.linear.up.shape == ("out", "rank")
    assert spec.linear.magnitude.axis is None
    assert spec.bias_rule is BiasRule.KEEP
    assert spec.magnitude_is is MagnitudeKind.NORM
    assert not spec.saves_scaling
    assert not spec.plain
    assert not spec.magnitude_only


def test_example() -> None:
    """Every key is in it, and says what its comment says."""
    spec = parsed(example_spec())
    assert spec.files == ("adapter_model.safetensors", "extra_*.safetensors")
    assert spec.prefixes == ("base_model.model.", "")
    assert spec.scales == (Scale(alpha="lora.alpha", rank="lora.rank"),)
    assert spec.linear.magnitude.axis is MagnitudeAxis.OUT
    assert spec.embedding is not None
    assert [p.text for p in spec.embedding.modules] == ["{module}.embed_tokens"]
    assert spec.declares[0].config == {"lora.type": "dora"}
    assert next((old.text, new.text) for old, new in spec.renames) == (
        "layers.{i}.attn.output_proj",
        "model.layers.{i}.self_attn.o_proj",
    )
    assert (spec.rows[0].up, spec.rows[0].magnitude) == (RowOrder.INTERLEAVED,) * 2
    assert spec.detect is not None
    assert spec.detect.config == {"trainer": "mine"}
    assert spec.unless is not None
    assert spec.refusals[0].why.startswith("version 0")
    assert spec.document is not None
    assert spec.notes == ()


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("scale = 2", [Scale(value=2.0)]),
        ('scale = "a.b"', [Scale(value="a.b")]),
        ('scale = { alpha = 16, rslora = "rs" }', [Scale(alpha=16.0, rslora="rs")]),
        (
            'scale = ["s", { value = "v", alpha = "a", rank = 8 }, 1.5]',
            [Scale(value="s"), Scale(value="v", alpha="a", rank=8.0), Scale(value=1.5)],
        ),
    ],
)
def test_scales(text: str, scales: list[Scale]) -> None:
    assert list(parsed(f'config = "c.json"\n{text}\n{TENSORS}').scales) == scales


@pytest.mark.parametrize(
    ("magnitude", "axis"),
    [
        ('["out"]', "OUT"),
        ('["out", 1]', "OUT"),
        ('[1, "out"]', "OUT"),
        ('["in"]', "IN"),
        ('["in", 1]', "IN"),
        ('[1, "in"]', "IN"),
    ],
)
def test_shapes_of_a_magnitude(magnitude: str, axis: str) -> None:
    text = TENSORS.replace('"{module}.m"', f'{{ name = "{{module}}.m", shape = {magnitude} }}')
    assert parsed(text).linear.magnitude.axis is MagnitudeAxis[axis]


def with_part(part: str) -> str:
    return TENSORS.replace('"{module}.m"', part)


MISTAKES = [
    ("", "line 1: tensors is missing"),
    ("tensors = 3", "line 1: tensors must be a table, not 3"),
    (f"titel = 'x'\n{TENSORS}", "line 1: titel is not known here: did you mean 'title'?"),
    (f"zzz = 'x'\n{TENSORS}", "line 1: zzz is not known here: known are base_model, bias"),
    (f"title = 3\n{TENSORS}", "line 1: title must be text, not 3"),
    (f"title = ''\n{TENSORS}", "line 1: title must be text, not ''"),
    (f"\nplain = 1\n{TENSORS}", "line 2: plain must be true or false, not 1"),
    (f"files = 3\n{TENSORS}", "line 1: files must be text or a list of texts, not 3"),
    (f"files = ['../x']\n{TENSORS}", "line 1: files ('../x') must name files directly in"),
    (f"weights = 'a/b'\n{TENSORS}", "line 1: weights ('a/b') must be the plain name of a"),
    (
        f"weights = 'a.npz'\n{TENSORS}",
        "line 1: weights ('a.npz') must be the plain name of a .safe",
    ),
    (f"config = '..'\n{TENSORS}", "line 1: config ('..') must be the plain name of a .json file"),
    (f"config = '*.json'\n{TENSORS}", "line 1: config ('*.json') must be the plain name of a"),
    (f"bias = 'scale'\n{TENSORS}", "line 1: bias must be one of keep, scaled, not 'scale'"),
    (f"scale = true\n{TENSORS}", "line 1: scale must be a number or the key of a config entry"),
    (f"scale = nan\n{TENSORS}", "line 1: scale must be a number"),
    (f"scale = []\n{TENSORS}", "line 1: scale is an empty list"),
    (f"scale = 'a.b'\n{TENSORS}", "line 1: scale needs 'config', the name of the file"),
    (f"scale = {{}}\n{TENSORS}", "line 1: scale needs a value or an alpha"),
    (f"scale = {{ value = 1, rank = 2 }}\n{TENSORS}", "line 1: scale.rank has no meaning without"),
    (f"scale = {{ alpha = 1, rank = 0 }}\n{TENSORS}", "line 1: scale.rank must be more than 0"),
    (f"scale = {{ alpha = 1, r = 2 }}\n{TENSORS}", "line 1: scale.r is not known here"),
    (f"scale = 1\n{TENSORS}alpha = '{{module}}.x'", "line 1: scale and tensors.alpha both give"),
    (f"base_model = 'x'\n{TENSORS}", "line 1: base_model needs 'config'"),
    (f"ignore = ['{{a']\n{TENSORS}", "line 1: ignore ('{a') has a '{' without its other half"),
    (f"declares_dora = 3\n{TENSORS}", "line 1: declares_dora must be a list of tables, not 3"),
    (f"declares_dora = [{{}}]\n{TENSORS}", "line 1: declares_dora is an empty table"),
    ("[tensors]\ndown = 3", "line 2: tensors.down must be text, not 3"),
    ("[tensors]\ndown = 'a'", "line 2: tensors.down ('a') has no {module}"),
    ("[tensors]\ndown = '{module}{a}'", "line 2: tensors.down ('{module}{a}') {a} needs a dot"),
    ("[tensors]\ndown = '{module}.a'", "line 1: tensors has no 'up'"),
    (TENSORS + "upp = '{module}.x'", "line 5: tensors.upp is not known here: did you mean 'up'?"),
    (
        TENSORS + "weight = '{module}.m'",
        "line 1: tensors has one name for magnitude and for weight",
    ),
    (with_part("{ shape = ['out'] }"), "line 4: tensors.magnitude has no name"),
    (
        with_part("{ name = '{module}.m', shape = ['x'] }"),
        "line 4: tensors.magnitude.shape must be",
    ),
    (
        with_part("{ name = '{module}.m', shape = ['out', true] }"),
        "line 4: tensors.magnitude.shape",
    ),
    (
        with_part("{ name = '{module}.m', values = 'x' }"),
        "line 4: tensors.magnitude.values must be",
    ),
    (
        with_part("{ name = '{module}.m', axis = 'in' }"),
        "line 4: tensors.magnitude.axis is not known",
    ),
    (
        TENSORS + "bias = { name = '{module}.x', shape = ['out'] }",
        "line 5: tensors.bias.shape is not",
    ),
    (TENSORS + "[embedding]", "line 5: embedding has no modules"),
    (
        TENSORS
        + TENSORS.replace("tensors", "embedding").replace('a"', 'a"', 1)
        + "modules = '{module}'\nalpha = '{module}.x'",
        "line 5: embedding and tensors must both have an alpha, or neither",
    ),
    (
        TENSORS
        + TENSORS.replace("tensors", "embedding").replace(
            '"{module}.m"', "{ name = '{module}.m', values = 'factor' }"
        )
        + "modules = '{module}'",
        "line 5: embedding has magnitudes of other values than those of tensors",
    ),
    (TENSORS + "[rename]\n'{a}.x' = '{b}.y'", "line 6: rename.{a}.x is renamed to a name with {b}"),
    (TENSORS + "[rename]\n'x' = 'y[.z]'", "line 6: rename.x is renamed to a name with optional"),
    (TENSORS + "[rename]\nx = 3", "line 6: rename.x must be text, not 3"),
    (TENSORS + "[[rows]]\nup = 'interleaved'", "line 5: rows has no modules"),
    (TENSORS + "[[rows]]\nmodules = 'q'\nup = 'x'", "line 7: rows.up must be one of same"),
    (TENSORS + "[[rows]]\nmodules = 'q'", "line 5: rows must have the magnitude"),
    (
        TENSORS + "[[rows]]\nmodules = 'q'\nmagnitude = 'halved'",
        "line 7: rows.magnitude must be one",
    ),
    (TENSORS + "[detect]", "line 5: detect has neither names nor config entries"),
    (
        TENSORS + "[detect]\nconfig.a = [1]",
        "line 6: detect.config.a must be text, a number or a flag",
    ),
    (
        TENSORS + "[detect]\nname = 'x'",
        "line 6: detect.name is not known here: did you mean 'names'",
    ),
    (TENSORS + "[detect.unless]\nx = 1", "line 6: detect.unless.x is not known here"),
    (TENSORS + "[[refuse]]\nnames = 'x'", "line 5: refuse has no 'why'"),
    (TENSORS + "[[refuse]]\nwhy = 'x'", "line 5: refuse has neither names, config entries nor"),
    (TENSORS + "[[refuse]]\nwhy = 'x'\nmagnitude = [1]", "line 7: refuse.magnitude must be"),
    ("config = 'c.json'\n" + TENSORS + "[write]\nx = '{y}'", "line 7: write.x has the placeholder"),
    ("config = 'c.json'\n" + TENSORS + "[write]\nx.y = 2020-01-01", "line 7: write.x.y cannot be"),
    ("config = 'c.json'\n" + TENSORS + "[write]\nx = [12:00:00]", "line 7: write.x cannot be"),
    (TENSORS + "[write]\nx = 1", "line 5: write needs 'config'"),
]


@pytest.mark.parametrize(("text", "told"), MISTAKES, ids=[told for _, told in MISTAKES])
def test_mistakes(text: str, told: str) -> None:
    found = problems(text)
    assert any(problem.startswith(told) for problem in found), found


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    found = problems("bias = 1\nplain = 2\n[tensors]\ndown = 3\n")
    lines = [int(problem.split(":")[0].removeprefix("line ")) for problem in found]
    assert lines == sorted(lines)
    assert {1, 2, 3, 4} <= set(lines)


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", "["])
def test_what_is_no_toml(text: str) -> None:
    with pytest.raises(InputError, match="is not valid TOML"):
        parsed(text)


def test_syntax_error_names_its_line() -> None:
    with pytest.raises(InputError, match="line 3"):
        parsed("\n\nx y")
