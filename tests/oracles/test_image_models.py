"""Adapters of image models, against what their trainers' own modules apply."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert import api
from dora_convert.core.lora import RankChoice
from dora_convert.errors import MismatchError
from tests.planning.test_image_names import CASES as MODELS
from tests.planning.test_image_names import converted

FIXTURES = Path(__file__).parents[2] / "fixtures"
LYCORIS = sorted(p.name for p in (FIXTURES / "lycoris").iterdir() if p.is_dir())


def merged(adapter: Path, base: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    report = api.merge(
        adapter,
        out,
        base=base,
        options=api.ReadOptions(**options),
        how=api.MergeOptions(samples=None),
    )
    assert report.verification is not None
    assert not report.verification.differences
    (file,) = out.glob("*.safetensors")
    assert file.name == (base.name if base.is_file() else "diffusion_pytorch_model.safetensors")
    return load_file(file)


def off(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """How far a result is from the expected one, as a share of the update."""
    return float((found.double() - expected).norm() / (expected.double() - base).norm())


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris(name: str, tmp_path: Path) -> None:
    case = FIXTURES / "lycoris" / name
    found = merged(case / "adapter.safetensors", case / "base.safetensors", tmp_path / "out")
    base = load_file(case / "base.safetensors")
    expected = load_file(case / "expected.safetensors")
    paths = {f"lora_unet_{k}".replace(".", "_"): k for k in base}
    assert len(expected) == 4
    for path, weight in expected.items():
        stored = paths[f"{path}_weight"]
        # LyCORIS computes in float32, and adds 1e-7 to the norm.
        assert off(found[stored], weight, base[stored]) < 3e-6
    untouched = base.keys() - {paths[f"{path}_weight"] for path in expected}
    assert untouched
    assert all(torch.equal(found[name], base[name]) for name in untouched)


@pytest.mark.parametrize("name", ["flux_meta", "flux_nometa"])
def test_diffusers(name: str, tmp_path: Path) -> None:
    folder = FIXTURES / "diffusers"
    base = load_file(folder / "flux_base.safetensors")
    found = merged(folder / name, folder / "flux_base.safetensors", tmp_path / "out")
    expected = load_file(folder / name / "expected.safetensors")
    assert expected
    for path, weight in expected.items():
        assert off(found[f"{path}.weight"], weight, base[f"{path}.weight"]) < 1e-6


def test_magnitudes_left_out(tmp_path: Path) -> None:
    """What LyCORIS 3.1 trained: W + D, whatever the magnitudes."""
    case = FIXTURES / "lycoris" / "lora_out"
    adapter, base = load_file(case / "adapter.safetensors"), load_file(case / "base.safetensors")
    file = case / "base.safetensors"
    found = merged(case / "adapter.safetensors", file, tmp_path / "out", ignore=["*.dora_scale"])
    name = "lora_unet_down_blocks_0_to_q"
    update = (
        adapter[f"{name}.lora_up.weight"].double() @ adapter[f"{name}.lora_down.weight"].double()
    )
    scale = float(adapter[f"{name}.alpha"]) / 4
    weight = base["down_blocks.0.to_q.weight"]
    expected = weight + scale * update
    assert off(found["down_blocks.0.to_q.weight"], expected, weight) < 1e-6


# A base in one scheme of names and an adapter in the other


def random_base(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        key: torch.randn(shape, generator=generator) for key, shape in MODELS[name].original.items()
    }


def trained(weights: Mapping[str, Tensor], prefix: str, flat: bool) -> dict[str, Tensor]:
    """A DoRA in kohya's names, one magnitude for each output, on these weights."""
    generator = torch.Generator().manual_seed(6)
    out = {}
    for path, weight in weights.items():
        name = prefix + (path.replace(".", "_") if flat else path)
        rows = len(weight)
        ones = (1,) * (weight.dim() - 2)
        out[f"{name}.lora_down.weight"] = torch.randn(2, *weight.shape[1:], generator=generator)
        up = torch.randn(rows, 2, *ones, generator=generator)
        out[f"{name}.lora_up.weight"] = up
        out[f"{name}.alpha"] = torch.tensor(1.0)
        norm = weight.flatten(1).norm(dim=1) * (1 + 0.1 * torch.randn(rows, generator=generator))
        out[f"{name}.dora_scale"] = norm.view(rows, 1, *ones)
    return out


def by_formula(weight: Tensor, adapter: Mapping[str, Tensor], name: str) -> Tensor:
    up, down = (adapter[f"{name}.lora_{part}.weight"].double() for part in ("up", "down"))
    update = 0.5 * (up.flatten(1) @ down.flatten(1))
    direction = weight.double().flatten(1) + update
    length = direction.norm(dim=1, keepdim=True)
    return (adapter[f"{name}.dora_scale"].double().view(-1, 1) * direction / length).view_as(weight)


SPLIT = {
    "Flux dev": (
        "transformer_blocks.0.attn.to_q transformer_blocks.1.attn.add_v_proj "
        "single_transformer_blocks.0.proj_mlp single_transformer_blocks.1.attn.to_k "
        "norm_out.linear x_embedder",
        "double_blocks.0.img_attn.qkv single_blocks.1.linear1 final_layer.adaLN_modulation.1",
    ),
    "SDXL": (
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q "
        "up_blocks.0.resnets.0.conv_shortcut mid_block.resnets.0.conv1 conv_in",
        "input_blocks.4.1.transformer_blocks.1.attn1.to_q middle_block.0.in_layers.2",
    ),
    "SD3.5": (
        "transformer_blocks.1.attn.to_k norm_out.linear",
        "joint_blocks.0.x_block.attn.qkv",
    ),
}


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_adapters_with_the_other_names(name: str, prefix: str, tmp_path: Path) -> None:
    """Each of two bases, by its authors and by diffusers, with an adapter in either's names.

    What is merged into one is, by diffusers' converter, what is merged into the other.
    """
    theirs = random_base(name)
    ours = converted(MODELS[name], dict(theirs))
    save_file(
        {prefix + k: v.contiguous() for k, v in theirs.items()}, tmp_path / "theirs.safetensors"
    )
    save_file({k: v.contiguous() for k, v in ours.items()}, tmp_path / "ours.safetensors")
    for number, (names, weights) in enumerate(zip(SPLIT[name], (ours, theirs), strict=True)):
        chosen = {path: weights[f"{path}.weight"] for path in names.split()}
        for flat in (False, True):
            given = "lora_unet_" if flat else "transformer."
            adapter = trained(chosen, given, flat)
            file = tmp_path / f"{number}{flat}.safetensors"
            save_file(adapter, file)
            results = {}
            for base in ("ours", "theirs"):
                out = tmp_path / f"{base}{number}{flat}"
                results[base] = merged(file, tmp_path / f"{base}.safetensors", out)
            original = {k.removeprefix(prefix): v for k, v in results["theirs"].items()}
            own = results["ours"] if number == 0 else original
            for path, weight in chosen.items():
                key = given + (path.replace(".", "_") if flat else path)
                expected = by_formula(weight, adapter, key)
                assert off(own[f"{path}.weight"], expected, weight) < 1e-6, path
            again = converted(MODELS[name], dict(original))
            assert again.keys() == results["ours"].keys()
            for key, tensor in again.items():
                torch.testing.assert_close(tensor, results["ours"][key], rtol=1e-6, atol=1e-6)


def test_one_magnitude_for_each_input_of_what_is_cut(tmp_path: Path) -> None:
    """A norm over the rows of a fused layer is none over the rows of its parts: refused."""
    theirs = random_base("Flux dev")
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "base.safetensors")
    ours = converted(MODELS["Flux dev"], dict(theirs))
    path = "transformer_blocks.0.attn.to_q"
    adapter = trained({path: ours[f"{path}.weight"]}, "lora_transformer_", flat=True)
    name = f"lora_transformer_{path}".replace(".", "_")
    adapter[f"{name}.dora_scale"] = ours[f"{path}.weight"].norm(dim=0, keepdim=True)
    save_file(adapter, tmp_path / "adapter.safetensors")
    with pytest.raises(MismatchError) as caught:
        merged(tmp_path / "adapter.safetensors", tmp_path / "base.safetensors", tmp_path / "out")
    assert "a magnitude per input needs the whole weight" in caught.value.problems[0]


def test_fused_modules_have_no_place_in_another_layout(tmp_path: Path) -> None:
    theirs = random_base("Flux dev")
    ours = converted(MODELS["Flux dev"], dict(theirs))
    save_file({k: v.contiguous() for k, v in ours.items()}, tmp_path / "base.safetensors")
    path = "double_blocks.0.img_attn.qkv"
    adapter = trained({path: theirs[f"{path}.weight"]}, "lora_unet_", flat=True)
    save_file(adapter, tmp_path / "adapter.safetensors")
    how = api.ConvertOptions(format="peft")
    with pytest.raises(MismatchError, match="cut or fused in this base") as caught:
        api.convert(
            tmp_path / "adapter.safetensors",
            tmp_path / "out",
            base=tmp_path / "base.safetensors",
            how=how,
        )
    assert caught.value.problems == (path,)


# to-lora


@pytest.mark.parametrize("name", LYCORIS)
def test_a_lora_of_it(name: str, tmp_path: Path) -> None:
    """Of full rank nothing is missed, so that base and LoRA are the expected weights."""
    case = FIXTURES / "lycoris" / name
    out = tmp_path / "lora"
    api.to_lora(
        case / "adapter.safetensors",
        out,
        base=case / "base.safetensors",
        how=api.LoraOptions(choice=RankChoice(rank=24), stack="comfyui"),
    )
    lora = load_file(out / "lora.safetensors")
    base = load_file(case / "base.safetensors")
    expected = load_file(case / "expected.safetensors")
    paths = {f"lora_unet_{k}".replace(".", "_"): k for k in base}
    for path, weight in expected.items():
        stored = paths[f"{path}_weight"]
        name = f"diffusion_model.{stored.removesuffix('.weight')}"
        down, up = lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"]
        update = (up.flatten(1).double() @ down.flatten(1).double()).view_as(weight)
        assert off(base[stored] + update, weight, base[stored]) < 1e-2
