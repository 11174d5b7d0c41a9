"""`convert`: bit for bit there and back, and PEFT computes with what it writes as with its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

from dora_convert import api
from dora_convert.core.adapter import Adapter
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, UnknownNameError
from dora_convert.storage.reader import Reader

from .models import FIXTURES, outputs, pixels, quiet, tokens

CASES = sorted(folder.name for folder in (FIXTURES / "peft").iterdir() if folder.is_dir())
CLASSES = {"bert_bias_all": AutoModel, "resnet_conv2d": AutoModelForImageClassification}
NVIDIA = FIXTURES / "nvidia"
PICKLES = api.ReadOptions(allow_pickle=True)


def converted(adapter: Path, out: Path, target: str, **options: object) -> Path:
    read = api.ReadOptions(allow_pickle=True, **options)  # type: ignore[arg-type]
    report = api.convert(adapter, out, options=read, how=api.ConvertOptions(format=target))
    assert sorted(report.files) == sorted(file.name for file in out.iterdir())
    assert report.format == target
    return out


def same(one: Adapter, other: Adapter) -> None:
    """Every value the same, bit for bit, and every scaling."""
    reader = Reader()

    def held(adapter: Adapter) -> dict[str, Tensor]:
        found = {}
        for path, module in adapter.modules.items():
            parts = {"m": module.magnitude, "w": module.weight}
            if module.delta is not None:
                parts |= {"down": module.delta.down, "up": module.delta.up}
            found |= {f"{path} {k}": reader.load(ref) for k, ref in parts.items() if ref}
        return found | {name: reader.load(ref) for name, ref in adapter.replaced.items()}

    mine, theirs = held(one), held(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for path, module in one.modules.items():
        assert module.scaling == other.modules[path].scaling
        assert module.axis is other.modules[path].axis
        assert module.kind is other.modules[path].kind


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    """The canonical form and back: PEFT's own file, and PEFT's own result."""
    case = FIXTURES / "peft" / name
    out = converted(case / "adapter", tmp_path / "out", "peft")
    before = load_file(case / "adapter" / "adapter_model.safetensors")
    after = load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    inputs = pixels() if name == "resnet_conv2d" else tokens()
    results = []
    for adapter in (case / "adapter", out):
        with quiet():
            loader = CLASSES.get(name, AutoModelForCausalLM)
            model = loader.from_pretrained(case / "base").eval()
            results.append(outputs(PeftModel.from_pretrained(model, adapter).eval(), inputs))
    assert torch.equal(*results)


# What NVIDIA's layout can hold: linear layers, one rank and one scaling.
@pytest.mark.parametrize("name", ["llama_qv", "llama_all_sharded", "llama_bf16", "gpt2_conv1d"])
def test_peft_to_nvidia_and_back(name: str, tmp_path: Path) -> None:
    source = FIXTURES / "peft" / name / "adapter"
    there = converted(source, tmp_path / "nvidia", "nvidia")
    back = converted(there, tmp_path / "back", "peft")
    same(api.read_adapter(source, PICKLES), api.read_adapter(there, PICKLES))
    same(api.read_adapter(source, PICKLES), api.read_adapter(back, PICKLES))
    assert api.read_adapter(there, PICKLES).format == "nvidia"


def test_nvidia_to_nvidia(tmp_path: Path) -> None:
    out = converted(NVIDIA / "adapter", tmp_path / "out", "nvidia")
    same(api.read_adapter(NVIDIA / "adapter", PICKLES), api.read_adapter(out, PICKLES))
    before = torch.load(NVIDIA / "adapter" / "adapter_model.bin", weights_only=True)
    after = torch.load(out / "adapter_model.bin", weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_nvidia_in_peft(tmp_path: Path) -> None:
    """Without the modules that have a magnitude alone; PEFT's merge against the reference's."""
    out = converted(NVIDIA / "adapter", tmp_path / "out", "peft", include=("*.[qkv]_proj",))
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(NVIDIA / "base", dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, out).merge_and_unload().state_dict()
    expected = torch.load(NVIDIA / "reference_merge.pt", weights_only=True)
    compared = [name for name in expected if name.endswith(("q_proj.weight", "v_proj.weight"))]
    assert compared
    for name in compared:
        # The reference merges in float16.
        assert torch.allclose(merged[name].double(), expected[name].double(), atol=2e-4)


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        converted(NVIDIA / "adapter", tmp_path / "out", "peft")
    assert "model.layers.0.mlp.down_proj: a magnitude without factors" in caught.value.problems
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama_embed_head", "model.embed_tokens: an adapted embedding"),
        ("llama_tokens", "model.embed_tokens: rows of tokens that were trained"),
        ("llama_patterns_rslora", "it has one rank for all modules, here are 3"),
    ],
)
def test_what_nvidia_cannot_hold(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        converted(FIXTURES / "peft" / name / "adapter", tmp_path / "out", "nvidia")
    assert reason in caught.value.problems


def test_another_type(tmp_path: Path) -> None:
    source = FIXTURES / "peft" / "llama_qv" / "adapter"
    how = api.ConvertOptions(format="peft", dtype=DType.BF16)
    api.convert(source, tmp_path / "out", how=how)
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before)


def test_an_unknown_layout(tmp_path: Path) -> None:
    source = FIXTURES / "peft" / "llama_qv" / "adapter"
    with pytest.raises(UnknownNameError, match="pfet"):
        api.convert(source, tmp_path / "out", how=api.ConvertOptions(format="pfet"))


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    source = FIXTURES / "peft" / "llama_all_sharded" / "adapter"
    for target, file in (("peft", "adapter_model.safetensors"), ("nvidia", "adapter_model.bin")):
        one = converted(source, tmp_path / f"{target}1", target)
        two = converted(source, tmp_path / f"{target}2", target)
        for name in (file, "adapter_config.json"):
            assert (one / name).read_bytes() == (two / name).read_bytes()


def test_the_config_peft_reads(tmp_path: Path) -> None:
    source = FIXTURES / "peft" / "llama_patterns_rslora" / "adapter"
    out = converted(source, tmp_path / "out", "peft")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    assert config["use_rslora"] is False  # its scale is in alpha
    assert all(key.startswith("^") for key in config["rank_pattern"])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_torchtune_there_and_back(family: str, tmp_path: Path) -> None:
    """Its export is set right through the base; written as its own file it is that bit for bit."""
    folder = FIXTURES / "torchtune" / family
    how = api.ConvertOptions(format="torchtune")
    api.convert(folder / "adapter", tmp_path / "out", base=folder / "base", how=how)
    own = torch.load(folder / "adapter" / "adapter_model.pt", weights_only=True)
    made = torch.load(tmp_path / "out" / "adapter_model.pt", weights_only=True)
    assert own.keys() == made.keys()
    assert all(torch.equal(own[key], made[key]) for key in own)


def test_peft_computes_with_a_torchtune_adapter(tmp_path: Path) -> None:
    """Llama has no biases, so that PEFT can hold it: PEFT's merge is torchtune's own."""
    folder = FIXTURES / "torchtune" / "llama"
    how = api.ConvertOptions(format="peft")
    source = folder / "adapter" / "adapter_model.pt"
    api.convert(source, tmp_path / "out", base=folder / "base", options=PICKLES, how=how)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    expected = load_file(folder / "reference_merge.safetensors")
    compared = [name for name in expected if name.endswith("_proj.weight")]
    assert len(compared) == 14
    for name in compared:
        assert (merged[name] - expected[name]).norm() < 1e-5 * expected[name].norm()


def test_scaled_biases_do_not_fit_peft(tmp_path: Path) -> None:
    folder = FIXTURES / "torchtune" / "qwen2"
    how = api.ConvertOptions(format="peft")
    with pytest.raises(InputError) as caught:
        api.convert(folder / "adapter", tmp_path / "out", base=folder / "base", how=how)
    assert any("scaled with the row" in problem for problem in caught.value.problems)


def test_into_a_described_layout_and_back(tmp_path: Path) -> None:
    """A format that only a file describes is written and read like any other."""
    spec = tmp_path / "mine.toml"
    spec.write_text(
        'title = "Mine"\nweights = "mine.safetensors"\nconfig = "mine.json"\n'
        'scale = "scale"\n'
        '[tensors]\ndown = { name = "{module}/a", shape = ["in", "rank"] }\n'
        'up = "{module}/b"\nmagnitude = { name = "{module}/m", shape = ["out"] }\n'
        '[write]\nscale = "{scale}"\n'
    )
    source = FIXTURES / "peft" / "llama_all_sharded" / "adapter"
    api.convert(source, tmp_path / "out", how=api.ConvertOptions(format=str(spec)))
    same(
        api.read_adapter(source, PICKLES),
        api.read_adapter(tmp_path / "out", api.ReadOptions(spec=spec)),
    )
