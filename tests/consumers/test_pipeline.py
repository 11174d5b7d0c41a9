"""A whole pipeline of diffusers: an adapter of two of its models, merged, and made a LoRA."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert import api
from dora_convert.core.lora import RankChoice
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, MismatchError, VerificationError
from tests.oracles.models import MAKER, distance, quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .test_diffusers import unet

WIDTH = 24


@dataclass(frozen=True)
class Trained:
    base: Path
    adapter: Path
    unet: Any
    text_encoder: Any


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What diffusers' own training script does in the end; the models stay adapted, unmerged."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1
    )
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": 8}
    encoder = CLIPTextModel(CLIPTextConfig(hidden_size=WIDTH, **heads, **ids))
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    (root / "vocab.json").write_text(json.dumps(words))
    (root / "merges.txt").write_text("#version: 0.2\n")
    models = {"unet": unet(), "text_encoder": encoder.eval()}
    with quiet():
        StableDiffusionPipeline(
            vae=vae,
            tokenizer=CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt")),
            scheduler=DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **models,
        ).save_pretrained(root / "base")
        layers = {}
        for name, targets in (("unet", ["to_q", "conv1", "proj_in"]), ("text_encoder", ["fc1"])):
            lora = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=targets)
            model = models[name]
            model.add_adapter(lora)
            MAKER.stir(model, torch.Generator().manual_seed(17))
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
            layers[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(root / "adapter", **layers)
    return Trained(root / "base", root / "adapter", **models)


def loaded(folder: Path) -> Any:
    with quiet():
        return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@torch.no_grad()
def outputs(denoiser: Any, encoder: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    text = encoder(torch.tensor([[0, 2, 3, 2, 1]]))[0]
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    return text.double(), denoiser(noise, torch.tensor([7]), text)[0].double()


def test_merged(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = api.merge(trained.adapter, out, base=trained.base)
    assert report.verification is not None
    before, pipeline = loaded(trained.base), loaded(out)
    goal = outputs(trained.unet, trained.text_encoder)
    for found, wanted, plain in zip(
        outputs(pipeline.unet, pipeline.text_encoder),
        goal,
        outputs(before.unet, before.text_encoder),
        strict=True,
    ):
        assert distance(plain, wanted) > 1e-2
        assert distance(found, wanted) < 1e-5
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (out / vae).read_bytes() == (trained.base / vae).read_bytes()
    names = {str(p.relative_to(trained.base)) for p in trained.base.rglob("*") if p.is_file()}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == names | {
        "README.md",
        "SHA256SUMS",
    }
    assert not api.verify(out).differences
    found = api.verify(out, adapter=trained.adapter, base=trained.base, samples=None)
    assert not found.differences
    assert found.modules == report.merged


def test_merged_into_shards_of_another_type(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = api.MergeOptions(max_shard_size=200_000, dtype=DType.F16)
    api.merge(trained.adapter, out, base=trained.base, how=how)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    pipeline = loaded(out)
    found = outputs(pipeline.unet.float(), pipeline.text_encoder.float())
    for ours, wanted in zip(found, outputs(trained.unet, trained.text_encoder), strict=True):
        assert distance(ours, wanted) < 1e-2


def test_a_changed_file_is_found(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.merge(trained.adapter, out, base=trained.base)
    shutil.copy(trained.base / "unet/diffusion_pytorch_model.safetensors", out / "unet")
    with pytest.raises(VerificationError) as caught:
        api.verify(out, adapter=trained.adapter, base=trained.base, samples=None)
    problems = caught.value.problems
    assert any(told.startswith("unet::") for told in problems)
    assert all("unet" in told for told in problems)


def test_one_model_alone(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        api.merge(trained.adapter, tmp_path / "out", base=trained.base / "unet")
    assert "text_encoder." in caught.value.problems[0]
    options = api.ReadOptions(exclude=["text_encoder.*"])
    api.merge(trained.adapter, tmp_path / "out", base=trained.base / "unet", options=options)
    with quiet():
        model = type(trained.unet).from_pretrained(tmp_path / "out")
    text, goal = outputs(trained.unet, trained.text_encoder)
    assert distance(outputs(model, trained.text_encoder)[1], goal) < 1e-5
    assert text.isfinite().all()


def test_quantised_one_by_one(trained: Trained, tmp_path: Path) -> None:
    how = api.MergeOptions(quantize="fp8")
    with pytest.raises(MismatchError) as caught:
        api.merge(trained.adapter, tmp_path / "out", base=trained.base, how=how)
    assert any("give the folder of one" in problem for problem in caught.value.problems)


def to_lora(trained: Trained, out: Path, stack: str) -> Path:
    how = api.LoraOptions(choice=RankChoice(rank=64), stack=stack)
    api.to_lora(trained.adapter, out, base=trained.base, how=how)
    (file,) = out.glob("*.safetensors")
    return file


def test_a_lora_that_the_pipeline_loads(trained: Trained, tmp_path: Path) -> None:
    file = to_lora(trained, tmp_path / "lora", "diffusers")
    pipeline = loaded(trained.base)
    with quiet():
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    found = outputs(pipeline.unet, pipeline.text_encoder)
    for ours, wanted in zip(found, outputs(trained.unet, trained.text_encoder), strict=True):
        assert distance(ours, wanted) < 1e-3


def test_the_same_for_comfyui(trained: Trained, tmp_path: Path) -> None:
    """By its key map (comfy/lora.py): kohya's names of a UNet, diffusers' of CLIP."""
    ours = load_file(to_lora(trained, tmp_path / "comfyui", "comfyui"))
    theirs = load_file(to_lora(trained, tmp_path / "diffusers", "diffusers"))
    expected = {}
    for name, tensor in theirs.items():
        if name.startswith("unet."):
            path, part, _ = name.removeprefix("unet.").rsplit(".", 2)
            part = {"lora_A": "lora_down", "lora_B": "lora_up"}[part]
            expected[f"lora_unet_{path.replace('.', '_')}.{part}.weight"] = tensor
        else:
            path, part, _ = name.split(".lora_linear_layer")[0], *name.rsplit(".", 2)[1:]
            assert path.startswith("text_encoder.text_model.encoder.layers.")
            part = {"down": "lora_A", "up": "lora_B"}[part]
            expected[f"{path}.{part}.weight"] = tensor
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def kohya(trained: Trained, file: Path) -> None:
    """The same adapter as LyCORIS would have written it: flat names, alphas, `[out, 1...]`."""
    prefixes = {"unet.": "lora_unet_", "text_encoder.": "lora_te_text_model_"}
    parts = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    tensors = {}
    (source,) = trained.adapter.glob("*.safetensors")
    for name, tensor in load_file(source).items():
        prefix = next(start for start in prefixes if name.startswith(start))
        path, _, part = name.removeprefix(prefix).rpartition(".lora_")
        flat = prefixes[prefix] + path.replace(".", "_")
        tensors[f"{flat}.alpha"] = torch.tensor(8.0)
        if part == "magnitude_vector":
            inner = len(load_file(source)[f"{prefix}{path}.lora_B.weight"].shape) - 1
            tensors[f"{flat}.dora_scale"] = tensor.reshape(-1, *(1,) * inner)
        else:
            tensors[f"{flat}.{parts[f'lora_{part}']}"] = tensor
    save_file(tensors, file)


@pytest.mark.parametrize("source", ["diffusers", "kohya"])
def test_converted_for_diffusers(trained: Trained, tmp_path: Path, source: str) -> None:
    """diffusers loads no `dora_scale`; in its own layout it runs the DoRA, scales and all."""
    adapter = trained.adapter
    if source == "kohya":
        adapter = tmp_path / "lycoris.safetensors"
        kohya(trained, adapter)
    out = tmp_path / "out"
    api.convert(adapter, out, base=trained.base, how=api.ConvertOptions(format="diffusers"))
    pipeline = loaded(trained.base)
    with quiet():
        pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    found = outputs(pipeline.unet, pipeline.text_encoder)
    for ours, wanted in zip(found, outputs(trained.unet, trained.text_encoder), strict=True):
        assert distance(ours, wanted) < 1e-5
    # Nothing was lost on the way: what is merged from it is the same, byte for byte.
    for name, given in (("one", trained.adapter), ("other", out)):
        api.merge(given, tmp_path / name, base=trained.base)
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert not api.verify(out).differences


def test_converted_for_diffusers_without_a_pipeline(trained: Trained, tmp_path: Path) -> None:
    how = api.ConvertOptions(format="diffusers")
    options = api.ReadOptions(exclude=["text_encoder.*"])
    with pytest.raises(InputError) as caught:
        api.convert(
            trained.adapter, tmp_path / "out", base=trained.base / "unet", options=options, how=how
        )
    assert all("give the pipeline as the base" in problem for problem in caught.value.problems)


@pytest.mark.parametrize("stack", ["peft", "any"])
def test_no_folder_of_peft_for_several_models(trained: Trained, tmp_path: Path, stack: str) -> None:
    with pytest.raises(MismatchError) as caught:
        to_lora(trained, tmp_path / "lora", stack)
    assert any("one of several models" in problem for problem in caught.value.problems)


def test_converted_for_one_model(trained: Trained, tmp_path: Path) -> None:
    """A file of diffusers becomes an adapter of PEFT, once it is known of which model."""
    how = api.ConvertOptions(format="peft")
    with pytest.raises(InputError) as caught:
        api.convert(trained.adapter, tmp_path / "out", how=how)
    assert any("give the base" in problem for problem in caught.value.problems)
    options = api.ReadOptions(exclude=["text_encoder.*"])
    api.convert(
        trained.adapter, tmp_path / "out", base=trained.base / "unet", options=options, how=how
    )
    with quiet():
        model = type(trained.unet).from_pretrained(trained.base / "unet")
        adapted = PeftModel.from_pretrained(model, tmp_path / "out").get_base_model()
    goal = outputs(trained.unet, trained.text_encoder)[1]
    assert distance(outputs(adapted, trained.text_encoder)[1], goal) < 1e-5
