"""diffusers itself: the file that `--for diffusers` writes, and the PEFT folder."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from dora_convert import api
from dora_convert.core.lora import RankChoice
from dora_convert.errors import MismatchError
from tests.oracles.models import MAKER, distance, quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel


def unet() -> Any:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ).eval()  # fmt: skip


def flux() -> Any:
    torch.manual_seed(1)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner, UNet2DConditionModel):
        result = model(noise(2, 4, 8, 8), torch.tensor([3, 9]), noise(2, 5, 24))
    else:
        result = model(
            hidden_states=noise(1, 16, 4), encoder_hidden_states=noise(1, 5, 24),
            pooled_projections=noise(1, 24), timestep=torch.tensor([0.5]),
            img_ids=noise(16, 3), txt_ids=noise(5, 3),
        )  # fmt: skip
    found: Tensor = result[0]
    return found.double()


CASES = [
    (unet, "unet", ["to_q", "to_v", "conv1", "proj_in"]),
    (flux, "transformer", ["to_q", "to_k", "to_out.0", "proj_mlp"]),
]


def trained(folder: Path, model: Any, targets: list[str]) -> None:
    with quiet():
        model.save_pretrained(folder / "base")
        lora = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=targets)
        adapted = get_peft_model(model, lora)
        MAKER.stir(adapted, torch.Generator().manual_seed(17))
        adapted.save_pretrained(folder / "adapter")


def converted(folder: Path, stack: str, form: str, **how: Any) -> Path:
    out = folder / f"{stack}-{form}"
    options = api.LoraOptions(choice=RankChoice(rank=6), stack=stack, form=form, **how)
    api.to_lora(folder / "adapter", out, base=folder / "base", how=options)
    return out


@pytest.mark.parametrize(("make", "component", "targets"), CASES, ids=["unet", "flux"])
def test_outputs(make: Any, component: str, targets: list[str], tmp_path: Path) -> None:
    plain = outputs(make())
    trained(tmp_path, make(), targets)
    with quiet():
        peft = PeftModel.from_pretrained(make(), converted(tmp_path, "peft", "peft")).eval()
    goal = outputs(peft)
    assert distance(plain, goal) > 1e-3
    for more in ({}, {"compact": True}):
        out = converted(tmp_path, "diffusers", "diffusers", **more)
        model = make()
        tensors = load_file(out / "pytorch_lora_weights.safetensors")
        assert all(name.startswith(f"{component}.") for name in tensors)
        with quiet():
            model.load_lora_adapter(tensors, prefix=component)
        assert distance(outputs(model.eval()), goal) < 1e-4
        shutil.rmtree(out)
    folder, model = converted(tmp_path, "diffusers", "peft"), make()
    with quiet():
        model.load_lora_adapter(
            folder, prefix="base_model.model", weight_name="adapter_model.safetensors"
        )
    assert distance(outputs(model.eval()), goal) < 1e-4


def test_a_base_that_is_no_denoiser(tmp_path: Path) -> None:
    trained(tmp_path, unet(), ["to_q"])
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    for name in ("AutoencoderKL", None):
        file.write_text(json.dumps(config | {"_class_name": name} if name else {}))
        with pytest.raises(MismatchError, match="diffusers has no name for these modules"):
            converted(tmp_path, "diffusers", "diffusers")
        assert not (tmp_path / "diffusers-diffusers").exists()
