"""Folders of several models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_convert.errors import InputError
from dora_convert.storage.checkpoint import without_variants
from dora_convert.storage.pipeline import open_model
from dora_convert.storage.selection import base_files

UNET = "diffusion_pytorch_model.safetensors"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


def weights(file: Path, *names: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2, 2) for name in names}, file)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pipeline"
    weights(root / "unet" / UNET, "a.weight", "b.weight")
    weights(root / "text_encoder" / "model.safetensors", "a.weight")
    (root / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text("{}")
    (root / "model_index.json").write_text(json.dumps(INDEX))
    return root


def test_every_model_in_its_folder(root: Path) -> None:
    # Copies in one file, for other programs, are no part of it.
    weights(root / "v1-5-pruned.safetensors", "model.diffusion_model.a.weight")
    (root / "README.md").write_text("...")
    found = open_model(root)
    assert found.shards == {
        "unet::a.weight": f"unet/{UNET}",
        "unet::b.weight": f"unet/{UNET}",
        "text_encoder::a.weight": "text_encoder/model.safetensors",
    }
    assert {name: ref.spec.name for name, ref in found.tensors.items()} == {
        name: name for name in found.shards
    }
    assert found.tensors["unet::a.weight"].stored.name == "a.weight"
    assert found.config == {}
    assert found.files == ("model_index.json", "tokenizer/vocab.json", "unet/config.json")


def test_variants(root: Path) -> None:
    weights(root / "unet" / "diffusion_pytorch_model.fp16.safetensors", "a.weight")
    weights(root / "text_encoder" / "model.fp16.safetensors", "a.weight")
    assert set(open_model(root).shards.values()) == {
        f"unet/{UNET}",
        "text_encoder/model.safetensors",
    }
    (root / "unet" / UNET).unlink()
    assert open_model(root).shards["unet::a.weight"].endswith("model.fp16.safetensors")


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ("model.safetensors model.fp16.safetensors", "model.safetensors"),
        ("model.fp16.safetensors model.json", "model.fp16.safetensors model.json"),
        (
            "diffusion_pytorch_model-00001-of-00002.safetensors "
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors "
            "diffusion_pytorch_model.fp16.safetensors.index.json",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
        ),
        ("net.fp16.safetensors net.safetensors", "net.fp16.safetensors net.safetensors"),
    ],
)
def test_which_names_are_variants(names: str, kept: str) -> None:
    assert without_variants(names.split()) == kept.split()


def test_models_that_are_not_read_go_along(root: Path) -> None:
    """Pickles, and quantised ones: an adapter of the others needs neither."""
    (root / "text_encoder" / "model.safetensors").unlink()
    (root / "text_encoder" / "pytorch_model.bin").write_bytes(b"...")
    found = open_model(root)
    assert "text_encoder/pytorch_model.bin" in found.files
    assert all(name.startswith("unet::") for name in found.tensors)
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    weights(root / "text_encoder" / "model.safetensors", "a.weight")
    (root / "text_encoder" / "config.json").write_text(json.dumps(config))
    found = open_model(root)
    assert "text_encoder/model.safetensors" in found.files
    assert all(name.startswith("unet::") for name in found.tensors)
    assert len(set(found.files)) == len(found.files)


def test_nothing_to_read(root: Path) -> None:
    for file in root.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="none of the models of pipeline"):
        open_model(root)


def test_a_folder_elsewhere_is_no_part_of_it(root: Path, tmp_path: Path) -> None:
    (root / "unet").rename(tmp_path / "unet")
    (root / "unet").symlink_to(tmp_path / "unet")
    assert all(name.startswith("text_encoder::") for name in open_model(root).tensors)


@pytest.mark.parametrize("text", ["[]", "{", '{"unet": ["diffusers", "X"], "vae": 3}'])
def test_a_broken_index(root: Path, text: str) -> None:
    (root / "model_index.json").write_text(text)
    if text.endswith("3}"):
        assert open_model(root).tensors
        return
    with pytest.raises(InputError, match=r"model_index\.json"):
        open_model(root)


def test_names_that_would_be_a_pipelines(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "unet::a.weight")
    with pytest.raises(InputError) as caught:
        open_model(tmp_path)
    assert "names with '::' in them are not read" in caught.value.problems[0]


def test_what_is_fetched() -> None:
    names = [
        "model_index.json", "README.md", "sd_xl_base_1.0.safetensors",
        f"unet/{UNET}", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json",
        "unet/diffusion_pytorch_model.bin", "unet/model.onnx",
        "text_encoder/pytorch_model.bin", "text_encoder/config.json",
        "text_encoder_2/model.safetensors.index.json",
        "text_encoder_2/model-00001-of-00001.safetensors",
        "tokenizer/vocab.json", "scheduler/scheduler_config.json",
        "onnx/unet/model.onnx",
    ]  # fmt: skip
    assert base_files(names) == sorted(
        [
            "model_index.json", f"unet/{UNET}", "unet/config.json",
            "text_encoder/pytorch_model.bin", "text_encoder/config.json",
            "text_encoder_2/model.safetensors.index.json",
            "text_encoder_2/model-00001-of-00001.safetensors",
            "tokenizer/vocab.json", "scheduler/scheduler_config.json",
        ]
    )  # fmt: skip
