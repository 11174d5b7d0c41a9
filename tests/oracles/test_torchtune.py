"""Adapters that torchtune wrote: its own merge, and its forward where the merge is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dora_convert import api
from dora_convert.api import ConvertOptions, ReadOptions
from dora_convert.api.settling import settled
from dora_convert.core.adapter import BiasRule
from dora_convert.errors import InputError
from dora_convert.formats.torchtune import FORMAT
from dora_convert.planning.roworder import in_torchtune_order
from dora_convert.planning.settle import with_bias_rule
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.reader import Reader

from .models import quiet

FIXTURES = Path(__file__).parents[2] / "fixtures" / "torchtune"
FAMILIES = ["llama", "qwen2"]
FILES = ["adapter_model.pt", "adapter_model.safetensors"]
PICKLE = ReadOptions(allow_pickle=True)


def factor(path: str) -> Tensor:
    """m / ||V|| in float64 of an attention module of Qwen2, whose rows torchtune never moves."""
    folder = FIXTURES / "qwen2"
    held = torch.load(folder / "adapter" / FILES[0], weights_only=True)
    name = path.removeprefix("model.").replace("self_attn", "attn")
    down, up, m = (
        held[f"{name}.{x}"].double() for x in ("lora_a.weight", "lora_b.weight", "magnitude")
    )
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    weight = load_file(folder / "base" / "model.safetensors")[f"{path}.weight"].double()
    return m / (weight + config["lora_alpha"] / config["r"] * up @ down).norm(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", FILES)
def test_weights_are_those_of_its_own_merge(family: str, file: str, tmp_path: Path) -> None:
    folder = FIXTURES / family
    api.merge(folder / "adapter" / file, tmp_path / "out", base=folder / "base", options=PICKLE)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(folder / "reference_merge.safetensors")
    assert merged.keys() == expected.keys()
    base = load_file(folder / "base" / "model.safetensors")
    changed = 0
    for key, tensor in expected.items():
        if key.endswith(".bias"):
            continue  # its merge leaves them, against its own forward
        error = (merged[key].double() - tensor.double()).norm()
        assert error <= 2e-6 * tensor.double().norm(), key
        changed += int(not torch.equal(merged[key], base[key]))
    assert changed == 14


@pytest.mark.parametrize("file", FILES)
def test_biases_are_scaled_as_in_its_forward(file: str, tmp_path: Path) -> None:
    folder = FIXTURES / "qwen2"
    api.merge(folder / "adapter" / file, tmp_path / "out", base=folder / "base", options=PICKLE)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    biases = [key for key in base if key.endswith(".bias")]
    assert len(biases) == 6
    for key in biases:
        expected = base[key].double() * factor(key.removesuffix(".bias"))
        assert (merged[key].double() - expected).norm() <= 1e-6 * expected.norm(), key
        assert not torch.allclose(merged[key], base[key], rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", FILES)
def test_what_was_done_is_told(family: str, file: str) -> None:
    folder = FIXTURES / family
    found = api.inspect(folder / "adapter" / file, base=folder / "base", options=PICKLE)
    told = " ".join(found.notes)
    assert ("base's order" in told) == ((family, file) != ("qwen2", FILES[0]))
    assert ("torchtune" in told) == ((family, file) != ("qwen2", FILES[0]))
    assert "may not be the base" not in told


@pytest.mark.parametrize("family", FAMILIES)
def test_from_its_export_back_to_its_own_file(family: str) -> None:
    """Bit for bit: all that the exporter did to q and k is undone, and the other way done again."""
    folder = FIXTURES / family
    base = open_checkpoint(folder / "base")
    found = settled(api.read_adapter(folder / "adapter", ReadOptions()), base)
    found = with_bias_rule(in_torchtune_order(found, base.config), base, BiasRule.SCALED)
    made = FORMAT.write(found)
    own = torch.load(folder / "adapter" / FILES[0], weights_only=True)
    assert made.tensors.keys() == own.keys()
    for name, ref in made.tensors.items():
        assert torch.equal(Reader().load(ref), own[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_as_it_was(family: str, tmp_path: Path) -> None:
    """Its own file written anew, without a base: torch reads the same tensors."""
    adapter, out = FIXTURES / family / "adapter", tmp_path / "out"
    how = ConvertOptions(format="torchtune")
    api.convert(adapter / FILES[0], out, options=PICKLE, how=how)
    own = torch.load(adapter / FILES[0], weights_only=True)
    made = torch.load(out / FILES[0], weights_only=True)
    assert made.keys() == own.keys()
    assert all(torch.equal(made[name], own[name]) for name in own)
    config = json.loads((out / "adapter_config.json").read_text())
    expected = json.loads((adapter / "adapter_config.json").read_text())
    assert sorted(config.pop("target_modules")) == sorted(expected.pop("target_modules"))
    assert config == expected


@pytest.mark.parametrize("file", FILES)
def test_as_peft(file: str, tmp_path: Path) -> None:
    """What PEFT makes of the converted file is what torchtune makes of its own."""
    folder = FIXTURES / "llama"
    base, out = folder / "base", tmp_path / "out"
    how = ConvertOptions(format="peft")
    api.convert(folder / "adapter" / file, out, base=base, options=PICKLE, how=how)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base)
        merged = PeftModel.from_pretrained(model, out).merge_and_unload().state_dict()
    expected = load_file(folder / "reference_merge.safetensors")
    for key, tensor in expected.items():
        error = (merged[key].double() - tensor.double()).norm()
        assert error <= 2e-6 * tensor.double().norm(), key


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    """Its forward leaves a bias alone; without the base the order of rows is not known either."""
    folder = FIXTURES / "qwen2"
    how = ConvertOptions(format="peft")
    with pytest.raises(InputError) as caught:
        api.convert(
            folder / "adapter" / FILES[0],
            tmp_path / "out",
            base=folder / "base",
            options=PICKLE,
            how=how,
        )
    assert len(caught.value.problems) == 6
    assert all("a bias that is scaled" in problem for problem in caught.value.problems)
    with pytest.raises(InputError) as caught:
        api.convert(folder / "adapter" / FILES[0], tmp_path / "out", options=PICKLE, how=how)
    assert sum("give the base" in problem for problem in caught.value.problems) == 18
