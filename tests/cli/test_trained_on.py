"""`--trained-on` on every command that reads a base."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from tests.cli.sandbox import Result, Sandbox

Run = Callable[..., Result]


def as_int8(weight: torch.Tensor) -> torch.Tensor:
    """By the definition: the peak of a row stands for 127."""
    peaks = weight.half().float().abs().amax(dim=1, keepdim=True)
    return (weight.half().float() * (127 / peaks)).round() * peaks / 127


def test_merge_equals_that_of_the_rounded_base(box: Sandbox, run: Run) -> None:
    args = ("-b", box.base, "--trained-on", "int8")
    result = run("merge", box.adapter, *args, "-o", box.out)
    assert result.code == 0
    assert "taken as int8 gives them back" in result.err
    checked = run("verify", box.out, "-a", box.adapter, *args, "--all")
    assert checked.code == 0
    assert "taken as int8 gives them back" in checked.err
    assert run("verify", box.out, "-a", box.adapter, "-b", box.base, "--all").code == 7
    got = {k: v for file in box.out.glob("*.safetensors") for k, v in load_file(file).items()}

    for file in box.base.glob("*.safetensors"):
        stored = load_file(file)
        rounded = {
            name: as_int8(weight).to(weight.dtype) if "_proj.weight" in name else weight
            for name, weight in stored.items()
        }
        save_file(rounded, file, metadata={"format": "pt"})
    other = box.out.with_name("other")
    assert run("merge", box.adapter, "-b", box.base, "-o", other).code == 0
    for file in other.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert (got[name].float() - tensor.float()).abs().max() < 1e-3, name


def test_other_commands_take_it(box: Sandbox, run: Run) -> None:
    args = ("-b", box.base, "--trained-on", "int8")
    plain = run("inspect", box.adapter, "-b", box.base, "--json").json
    rounded = run("inspect", box.adapter, *args, "--json").json
    assert plain["total"]["effect"] != rounded["total"]["effect"]
    assert any("taken as int8 gives them back" in note for note in rounded["notes"])
    lora = run("to-lora", box.adapter, *args, "-o", box.out.with_name("lora"), "--rank", 4)
    assert lora.code == 0
    assert "taken as int8 gives them back" in lora.err


def test_a_base_in_a_pickle(box: Sandbox, run: Run) -> None:
    """The same bytes as from safetensors, and verified by the other road."""
    args = ("--trained-on", "int8", "--verify", "all")
    assert run("merge", box.adapter, "-b", box.base, "-o", box.out, *args).code == 0
    (file,) = box.base.glob("*.safetensors")
    torch.save(load_file(file), box.base / "pytorch_model.bin")
    file.unlink()
    other = box.out.with_name("other")
    result = run("merge", box.adapter, "-b", box.base, "-o", other, *args, "--allow-pickle")
    assert result.code == 0
    one, two = (load_file(next(out.glob("*.safetensors"))) for out in (box.out, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_scheme_that_is_not_known(box: Sandbox, run: Run) -> None:
    result = run("merge", box.adapter, "-b", box.base, "-o", box.out, "--trained-on", "int9")
    assert result.code == 3
    assert "Did you mean 'int8'?" in result.err
