"""`merge --quantize`: transformers loads what is written, and computes what the scheme allows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dora_convert import api
from dora_convert.api.bases import open_base
from dora_convert.errors import InputError, MismatchError, VerificationError
from dora_convert.execution.decoding import open_reader

from .models import Trained, load, merged_by_formula, outputs, quiet, tokens, train

WIDTH = 256
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]
# Relative error of a random weight after quantisation, measured on normal values: a bound of each.
SCHEMES = {
    "fp8": 0.03,
    "fp8_dynamic": 0.03,
    "w8a8": 0.015,
    "w8a16": 0.015,
    "w4a16": 0.13,
    "int8": 0.015,
    "nf4": 0.11,
    "nf4_dq": 0.11,
    "fp4": 0.15,
    "mlx": 0.11,
    "nvfp4a16": 0.12,
    "mxfp4a16": 0.15,
}
# Loaded by transformers on a CPU (the others need a GPU, or MLX).
LOADED = ("fp8", "fp8_dynamic", "w8a8", "w8a16", "w4a16", "int8", "nf4", "nf4_dq", "fp4")


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("dense")
    return train(folder, tiny(), tokens(), target_modules=MODULES)


@pytest.fixture(scope="module")
def dense(case: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What is to be stored: the formula in float64, from PEFT's file."""
    stored = load_file(case.base / "model.safetensors")
    adapter = load_file(case.adapter / "adapter_model.safetensors")
    return {
        name: merged_by_formula(name.removesuffix(".weight"), weight, adapter, scaling=2.0)
        for name, weight in stored.items()
    }


def written(case: Trained, out: Path, scheme: str, **how: Any) -> Path:
    options = api.MergeOptions(quantize=scheme, samples=None, **how)
    report = api.merge(case.adapter, out, base=case.base, how=options)
    assert report.merged == 2 * len(MODULES)
    api.verify(out, adapter=case.adapter, base=case.base, samples=None)
    return out


@pytest.fixture(scope="module")
def stored(case: Trained, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The merge in a scheme, which is made and recomputed once, and not to be changed."""

    @cache
    def stored(scheme: str) -> Path:
        return written(case, tmp_path_factory.mktemp(scheme) / "out", scheme)

    return stored


@pytest.mark.parametrize("scheme", LOADED)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it(
    scheme: str, case: Trained, dense: dict[str, Tensor], stored: Callable[[str], Path]
) -> None:
    """Its own decoding is as near to the exact result as the scheme's grid is."""
    out = stored(scheme)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
        expected = load(case.base, AutoModelForCausalLM)
        expected.load_state_dict({k: v.float() for k, v in dense.items()})
        logits = outputs(expected.eval(), case.inputs)
        got = outputs(model, case.inputs)
    # Twice the weights' error and bfloat16's own: a wrong layout gives about 1.4.
    assert (got - logits).norm() < (3 * SCHEMES[scheme] + 0.03) * logits.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_keeps_what_it_can(
    scheme: str, dense: dict[str, Tensor], stored: Callable[[str], Path]
) -> None:
    """Read back as a base and merged with nothing: within the scheme's error, tensor by tensor."""
    out = stored(scheme)
    config = json.loads((out / "config.json").read_text())
    assert config.get("quantization_config") or config.get("quantization")
    found = open_base(out, api.ReadOptions())
    assert found.tensors.keys() == dense.keys()
    reader = open_reader()
    for name, ref in found.tensors.items():
        error = (reader.load(ref).double() - dense[name]).norm() / dense[name].norm()
        assert error < SCHEMES[scheme], name


@pytest.mark.parametrize("scheme", ["nf4_dq", "nvfp4a16", "fp8"])
def test_the_same_bytes_whatever_the_workers(
    scheme: str, case: Trained, tmp_path: Path, stored: Callable[[str], Path]
) -> None:
    expected = (stored(scheme) / "model.safetensors").read_bytes()
    for workers in (1, 3):
        how = api.MergeOptions(quantize=scheme, samples=0, workers=workers)
        api.merge(case.adapter, tmp_path / str(workers), base=case.base, how=how)
        assert (tmp_path / str(workers) / "model.safetensors").read_bytes() == expected


def test_kept_dense(case: Trained, dense: dict[str, Tensor], tmp_path: Path) -> None:
    out = written(case, tmp_path / "out", "w4a16", keep_dense=("*.down_proj",))
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(stored[name], dense[name].bfloat16())
    assert "model.layers.0.mlp.up_proj.weight_packed" in stored
    with quiet():
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("scheme", ["fp8", "w4a16", "nf4"])
def test_a_base_in_the_same_scheme_keeps_its_bytes(
    scheme: str, case: Trained, tmp_path: Path, stored: Callable[[str], Path]
) -> None:
    """Only what is merged is stored anew; the rest of a quantised base is copied."""
    first = stored(scheme)
    how = api.MergeOptions(quantize=scheme)
    api.merge(case.adapter, tmp_path / "second", base=first, how=how)
    before = load_file(first / "model.safetensors")
    after = load_file(tmp_path / "second" / "model.safetensors")
    assert before.keys() == after.keys()
    touched = {n for n in before if any(f".{module}." in n for module in MODULES)}
    assert touched
    for name in before.keys() - touched:
        same = before[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(same, after[name].contiguous().view(-1).view(torch.uint8)), name
    assert any(not torch.equal(before[n].float(), after[n].float()) for n in touched)


@pytest.mark.parametrize("scheme", ["w4a16", "mlx"])
def test_scales_of_a_base_in_4_bits_are_kept(
    scheme: str, case: Trained, tmp_path: Path, stored: Callable[[str], Path]
) -> None:
    """By default: of an update that a grid swallows that leaves less noise than new ones do."""
    first = stored(scheme)
    small = api.ReadOptions(scale=0.05)
    noise = {}
    for scales in (None, "fold", "fresh"):
        how = api.MergeOptions(quantize=scheme, samples=None, scales=scales)
        out = tmp_path / f"{scales}"
        report = api.merge(case.adapter, out, base=first, options=small, how=how)
        assert report.survival is not None
        noise[scales] = report.survival.total.noise
    assert noise[None] == noise["fold"] < noise["fresh"]
    one, other = (tmp_path / n / "model.safetensors" for n in ("None", "fold"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_base_of_64_bits(scheme: str, case: Trained, tmp_path: Path) -> None:
    """No scheme has types as wide: it is stored as of 32 bits, which lose nothing here."""
    wide = tmp_path / "wide"
    shutil.copytree(case.base, wide)
    tensors = load_file(case.base / "model.safetensors")
    found = {}
    for dtype in (torch.float64, torch.float32):
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(cast, wide / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / str(dtype)
        api.merge(case.adapter, out, base=wide, how=api.MergeOptions(quantize=scheme))
        found[dtype] = load_file(out / "model.safetensors")
    one, other = found.values()
    assert one.keys() == other.keys()
    for name in one.keys() - tensors.keys():  # parts; what is dense keeps its own type
        assert one[name].dtype == other[name].dtype, name
        same = one[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(same, other[name].contiguous().view(-1).view(torch.uint8)), name


def test_verify_finds_a_changed_code(
    case: Trained, tmp_path: Path, stored: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stored("w8a16"), out)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name][17] *= 2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError) as caught:
        api.verify(out, adapter=case.adapter, base=case.base, samples=None)
    assert any("model.layers.1.mlp.down_proj" in p for p in caught.value.problems)


def test_verify_names_a_checkpoint_of_several_schemes(
    case: Trained, tmp_path: Path, stored: Callable[[str], Path]
) -> None:
    out, other = tmp_path / "out", stored("w8a8")
    shutil.copytree(stored("w4a16"), out)
    mine, theirs = (json.loads((at / "config.json").read_text()) for at in (out, other))
    group = theirs["quantization_config"]["config_groups"]["group_0"]
    mine["quantization_config"]["config_groups"]["group_1"] = group
    (out / "config.json").write_text(json.dumps(mine))
    (out / "SHA256SUMS").unlink()  # of another tool's checkpoint there are none
    with pytest.raises(InputError, match="several schemes: w4a16, w8a8"):
        api.verify(out, adapter=case.adapter, base=case.base)


def test_a_shape_that_the_scheme_cannot_hold(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    trained = train(tmp_path, model.to(torch.bfloat16), tokens(), target_modules=["q_proj"])
    how = api.MergeOptions(quantize="w4a16")
    with pytest.raises(MismatchError) as caught:
        api.merge(trained.adapter, tmp_path / "out", base=trained.base, how=how)
    assert any("q_proj" in p and "--keep-dense" in p for p in caught.value.problems)
    assert not (tmp_path / "out").exists()


def test_a_scheme_that_is_only_read(case: Trained, tmp_path: Path) -> None:
    how = api.MergeOptions(quantize="gptq")
    with pytest.raises(InputError, match="not written"):
        api.merge(case.adapter, tmp_path / "out", base=case.base, how=how)


def test_weights_that_are_stored_the_other_way(tmp_path: Path) -> None:
    """GPT-2's Conv1D is no Linear: no scheme's reader takes it as it lies there."""
    torch.manual_seed(5)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4))
    trained = train(tmp_path, model, tokens(), target_modules=["c_attn"])
    for scheme in ("nf4", "int8", "w8a8", "fp8"):
        how = api.MergeOptions(quantize=scheme)
        with pytest.raises(MismatchError) as caught:
            api.merge(trained.adapter, tmp_path / "out", base=trained.base, how=how)
        assert len(caught.value.problems) == 4
        assert all("[in, out]" in p and "--keep-dense" in p for p in caught.value.problems)
    assert not (tmp_path / "out").exists()
