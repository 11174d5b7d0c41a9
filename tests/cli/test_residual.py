"""`merge --residual-rank`: what is written, what is said, and what goes with what."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from safetensors.torch import load_file

from tests.cli.sandbox import MODULES, Result, Sandbox

Run = Callable[..., Result]


def test_a_folder_beside_the_weights(box: Sandbox, run: Run) -> None:
    args = ("-b", box.base, "-o", box.out, "--quantize", "fp8_dynamic", "--residual-rank", 8)
    result = run("merge", box.adapter, *args)
    assert result.code == 0
    assert "with the LoRA of rank 8 in residual/ the weights are " in result.err
    folder = box.out / "residual"
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] is None
    assert config["use_dora"] is False
    pairs = load_file(folder / "adapter_model.safetensors")
    assert {f"base_model.model.{path}.lora_A.weight" for path in MODULES} <= pairs.keys()
    assert run("verify", box.out, "-a", box.adapter, "-b", box.base, "--all").code == 0


def test_a_dry_run_names_the_files(box: Sandbox, run: Run) -> None:
    args = ("-b", box.base, "-o", box.out, "--quantize", "w8a8", "--residual-rank", 8, "-n")
    found = run("merge", box.adapter, *args, "--json").json
    assert "residual/adapter_model.safetensors" in found["files"]
    assert found["residual"] is None
    assert not box.out.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--residual-rank", 8), "--residual-rank goes with --quantize"),
        (("--quantize", "w8a8", "--weight", "norm"), "--weight and --stats go with"),
        (
            ("--quantize", "w8a8", "--residual-rank", 8, "--weight", "norm", "--stats", "s"),
            "exclude each other",
        ),
    ],
)
def test_what_goes_with_what(
    args: tuple[object, ...], message: str, box: Sandbox, run: Run
) -> None:
    result = run("merge", box.adapter, "-b", box.base, "-o", box.out, *args)
    assert result.code == 2
    assert message in result.err


def test_nothing_to_correct(box: Sandbox, run: Run) -> None:
    dense = [arg for path in MODULES for arg in ("--keep-dense", path)]
    args = ("--quantize", "w8a8", *dense, "--residual-rank", 8)
    result = run("merge", box.adapter, "-b", box.base, "-o", box.out, *args)
    assert result.code == 3
    assert "no adapted module is quantised" in result.err
    assert not box.out.exists()


def test_a_rank_that_nobody_loads(box: Sandbox, run: Run) -> None:
    args = ("--quantize", "w8a8", "--residual-rank", 513)
    result = run("merge", box.adapter, "-b", box.base, "-o", box.out, *args)
    assert result.code == 3
    assert "loaded by no server" in result.err
