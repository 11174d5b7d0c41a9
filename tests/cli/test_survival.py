"""`merge --quantize` says what the grid keeps, and fails where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.sandbox import Result, Sandbox

SCHEME = "fp8_dynamic"


@pytest.fixture
def on_grid(box: Sandbox, run: Callable[..., Result], tmp_path: Path) -> Path:
    """A base on the scheme's grid, and an adapter that turns its rows by less than a step."""
    grid = tmp_path / "grid"
    result = run("merge", box.adapter, "-b", box.base, "-o", grid, "--quantize", SCHEME)
    assert result.code == 0
    adapter, stored = load_file(box.factors), load_file(grid / "model.safetensors")
    for key in adapter:
        path = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if key.endswith("lora_magnitude_vector"):
            weight = stored[f"{path}.weight"].float() * stored[f"{path}.weight_scale"]
            adapter[key] = weight.norm(dim=1)
        elif key.endswith("lora_B.weight"):
            adapter[key] *= 0.01
    save_file(adapter, box.factors)
    return grid


def test_a_sentence_and_figures(box: Sandbox, run: Callable[..., Result]) -> None:
    result = run("merge", box.adapter, "-b", box.base, "-o", box.out, "--quantize", SCHEME)
    assert result.code == 0
    assert f"the {SCHEME} grid keeps " in result.err
    assert "Warning" not in result.err
    args = ("-b", box.base, "-o", box.out, "--quantize", SCHEME, "--overwrite", "--json")
    found = json.loads(run("merge", box.adapter, *args).out)["survival"]
    assert found["scheme"] == SCHEME
    assert 0.9 < found["total"]["kept"] < 1.1
    assert len(found["modules"]) == json.loads(run("merge", box.adapter, *args).out)["merged"]


def test_a_dense_merge_has_none(box: Sandbox, run: Callable[..., Result]) -> None:
    result = run("merge", box.adapter, "-b", box.base, "-o", box.out, "--json")
    assert json.loads(result.out)["survival"] is None


def test_too_little_is_kept(box: Sandbox, on_grid: Path, run: Callable[..., Result]) -> None:
    args = ("-b", on_grid, "-o", box.out, "--quantize", SCHEME)
    result = run("merge", box.adapter, *args, "--min-survival", "0.9")
    assert result.code == 7
    assert "keeps less than 90%" in result.err
    assert "16-bit original" in result.err
    assert not box.out.exists()
    # With a LoRA of what is missing it is enough.
    beside = ("--residual-rank", 8, "--min-survival", "0.9")
    assert run("merge", box.adapter, *args, *beside).code == 0
    result = run("merge", box.adapter, *args, "--overwrite")
    assert result.code == 0
    assert "Warning: the grid swallowed the update" in result.err


@pytest.mark.parametrize("args", [(), ("--quantize", SCHEME, "-n")])
def test_asked_for_where_nothing_is_measured(
    args: tuple[str, ...], box: Sandbox, run: Callable[..., Result]
) -> None:
    result = run(
        "merge", box.adapter, "-b", box.base, "-o", box.out, *args, "--min-survival", "0.5"
    )
    assert result.code == 2
    assert "--min-survival goes with --quantize" in result.err


def test_scales(box: Sandbox, run: Callable[..., Result], on_grid: Path) -> None:
    """By default the ones that leave less noise; in 8 bits these are new ones."""
    found = {}
    for name, args in (("", ()), ("fold", ("--scales", "fold")), ("fresh", ("--scales", "fresh"))):
        out = box.out.with_name(f"out{name}")
        result = run("merge", box.adapter, "-b", on_grid, "-o", out, "--quantize", SCHEME, *args)
        assert result.code == 0
        found[name] = (out / "model.safetensors").read_bytes()
        assert run("verify", out, "-a", box.adapter, "-b", on_grid, "--all").code == 0
    assert found[""] == found["fresh"] != found["fold"]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [(SCHEME, "it has no scales to keep"), ("fp8", "no scales that the factor of a row could")],
)
def test_no_scales_to_fold_into(
    scheme: str, message: str, box: Sandbox, run: Callable[..., Result]
) -> None:
    args = ("-b", box.base, "-o", box.out, "--quantize", scheme, "--scales", "fold")
    result = run("merge", box.adapter, *args)
    assert result.code == 3
    assert message in result.err
    assert not box.out.exists()
    result = run("merge", box.adapter, "-b", box.base, "-o", box.out, "--scales", "fold")
    assert result.code == 2


def test_nothing_to_quantise(box: Sandbox, run: Callable[..., Result]) -> None:
    for args in (("mxfp4",), (SCHEME, "--keep-dense", "*")):
        result = run("merge", box.adapter, "-b", box.base, "-o", box.out, "--quantize", *args)
        assert result.code == 3
        assert "the base has no weight, or none that is not kept dense" in result.err
    result = run("inspect", box.adapter, "-b", box.base, "--trained-on", "mxfp4")
    assert result.code == 3
    assert "no weight that gpt-oss MXFP4 experts would quantise" in result.err
