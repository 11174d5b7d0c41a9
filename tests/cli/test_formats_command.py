"""`formats --example-spec`, and `--spec` and `--format` on the commands that read an adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_convert.formats import example_spec
from tests.cli.sandbox import Result, Sandbox

Run = Callable[..., Result]
FIXTURES = Path(__file__).parents[2] / "fixtures"
SPEC = """\
files = ["mine.safetensors"]
config = "settings.json"
scale = { alpha = "lora.alpha", rank = "lora.rank" }

[tensors]
down = "{module}.down"
up = "{module}.up"
magnitude = { name = "{module}.length", shape = ["out"] }
"""
NAMES = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "length"}


@pytest.fixture
def mine(box: Sandbox, tmp_path: Path) -> tuple[Path, Path]:
    """The sandbox's adapter in a layout that nobody knows, and its description."""
    folder = tmp_path / "mine"
    folder.mkdir()
    tensors = {}
    for name, tensor in load_file(box.adapter / "adapter_model.safetensors").items():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        tensors[f"{path}.{NAMES[f'lora_{part}'.removesuffix('.default')]}"] = tensor
    save_file(tensors, folder / "mine.safetensors")
    config = json.loads((box.adapter / "adapter_config.json").read_text())
    settings = {"lora": {"alpha": config["lora_alpha"], "rank": config["r"]}}
    (folder / "settings.json").write_text(json.dumps(settings))
    spec = tmp_path / "my_format.toml"
    spec.write_text(SPEC)
    return folder, spec


def test_example_is_printed_and_taken(run: Run, tmp_path: Path) -> None:
    result = run("formats", "--example-spec")
    assert result.code == 0
    assert result.out == example_spec()
    file = tmp_path / "example.toml"
    file.write_text(result.out)
    held = tmp_path / "adapter"
    held.mkdir()
    save_file({"x": torch.ones(2)}, held / "adapter_model.safetensors")
    told = run("inspect", held, "--spec", file)
    assert told.code == 3
    assert "x [2] is not understood" in told.err


def test_merge_by_a_description(run: Run, box: Sandbox, mine: tuple[Path, Path]) -> None:
    """The bytes are those that the same adapter gives in PEFT's layout."""
    folder, spec = mine
    assert run("merge", folder, "--base", box.base, "-o", box.out, "--spec", spec).code == 0
    other = box.out.with_name("other")
    assert run("merge", box.adapter, "--base", box.base, "-o", other).code == 0
    for file in sorted(other.glob("*.safetensors")):
        assert file.read_bytes() == (box.out / file.name).read_bytes()


def test_every_command_that_reads_an_adapter_takes_it(
    run: Run, box: Sandbox, mine: tuple[Path, Path]
) -> None:
    folder, spec = mine
    report = run("inspect", folder, "--spec", spec, "--json").json
    assert report["format"] == "my_format"
    assert run("merge", folder, "-b", box.base, "-o", box.out, "--spec", spec).code == 0
    verified = run("verify", box.out, "--adapter", folder, "-b", box.base, "--spec", spec)
    assert verified.code == 0
    lora = box.out.with_name("lora")
    done = run("to-lora", folder, "-b", box.base, "-o", lora, "--rank", 4, "--spec", spec)
    assert done.code == 0
    peft = box.out.with_name("peft")
    assert run("convert", folder, "--to", "peft", "-o", peft, "--spec", spec).code == 0
    before = load_file(box.adapter / "adapter_model.safetensors")
    after = load_file(peft / "adapter_model.safetensors")
    assert {n.removesuffix(".weight"): t.tolist() for n, t in after.items()} == {
        n.removesuffix(".weight"): t.tolist() for n, t in before.items()
    }


def test_without_a_description(run: Run, mine: tuple[Path, Path]) -> None:
    result = run("inspect", mine[0])
    assert result.code == 3
    assert "not an adapter in a known format" in result.err
    assert "--spec FILE" in result.err


def test_wrong_description(run: Run, mine: tuple[Path, Path]) -> None:
    folder, spec = mine
    spec.write_text(SPEC.replace("up =", "upp =").replace("scale", "scal"))
    result = run("inspect", folder, "--spec", spec)
    assert result.code == 3
    assert str(spec) in result.err
    assert "line 3: scal is not known here: did you mean 'scale'?" in result.err
    assert "line 7: tensors.upp is not known here: did you mean 'up'?" in result.err
    assert "--example-spec" in result.err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"x y", "is not valid TOML"),
        (b"# " + b"x" * (1 << 16), "is too large for such a document"),
        (b"", "is empty"),
    ],
)
def test_description_that_is_no_text(
    run: Run, mine: tuple[Path, Path], content: bytes, told: str
) -> None:
    folder, spec = mine
    spec.write_bytes(content)
    result = run("inspect", folder, "--spec", spec)
    assert result.code == 3
    assert told in result.err


def test_no_description_there(run: Run, mine: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("inspect", mine[0], "--spec", tmp_path / "nowhere.toml")
    assert result.code == 3
    assert "there is no description of a format at" in result.err


def test_format_that_is_named(run: Run, tmp_path: Path) -> None:
    """A config of PEFT beside tensors of mlx-lm, and both layouts in one file."""
    both = tmp_path / "both"
    shutil.copytree(FIXTURES / "mlx" / "linear", both)
    peft = load_file(FIXTURES / "peft" / "llama_qv" / "adapter" / "adapter_model.safetensors")
    save_file(load_file(both / "adapters.safetensors") | peft, both / "adapters.safetensors")
    result = run("inspect", both)
    assert result.code == 3
    assert "more than one adapter format fits: mlx, peft" in result.err
    assert "--format mlx" in result.err
    named = run("inspect", both, "--format", "mlx", "--ignore", "base_model.*", "--json")
    assert named.json["format"] == "mlx"


def test_format_that_does_not_exist(run: Run) -> None:
    result = run("inspect", FIXTURES / "mlx" / "linear", "--format", "mlxx")
    assert result.code == 3
    assert "Did you mean 'mlx'?" in result.err


def test_format_and_description(run: Run, mine: tuple[Path, Path]) -> None:
    result = run("inspect", mine[0], "--spec", mine[1], "--format", "mlx")
    assert result.code == 3
    assert "either named or described" in result.err


def test_scaling_that_was_not_saved(run: Run, mine: tuple[Path, Path]) -> None:
    folder, spec = mine
    spec.write_text("\n".join(ln for ln in SPEC.splitlines() if not ln.startswith("scale")))
    result = run("inspect", folder, "--spec", spec)
    assert result.code == 3
    assert "--scale" in result.err
    report = run("inspect", folder, "--spec", spec, "--scale", 3, "--json").json
    assert all(group["scalings"] == [3.0] for group in report["groups"])


def test_a_base_that_has_no_biases_is_no_hindrance(
    box: Sandbox, run: Callable[..., Result]
) -> None:
    """That none is there to be scaled does not change what is written."""
    alone, beside = box.root / "alone", box.root / "beside"
    for out, base in ((alone, ()), (beside, ("-b", box.base))):
        assert run("convert", box.adapter, "--to", "mlx", "-o", out, *base).code == 0
    names = {path.name for path in alone.iterdir()} - {"README.md"}
    assert names == {"adapters.safetensors", "adapter_config.json", "SHA256SUMS"}
    assert all((alone / name).read_bytes() == (beside / name).read_bytes() for name in names)
