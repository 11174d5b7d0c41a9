"""What holds for every registered format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_convert.core.bundle import Bundle
from dora_convert.errors import InputError
from dora_convert.formats import detect, formats
from dora_convert.storage.bundle import open_bundle

from ..core.values import bundle

FIXTURES = Path(__file__).parents[2] / "fixtures"
ADAPTERS = {
    **{f"peft/{p.name}": "peft" for p in sorted((FIXTURES / "peft").iterdir()) if p.is_dir()},
    "nvidia": "nvidia",
    "minilm": "peft",
    "megatron": "megatron",
    **{f"torchtune/{name}/adapter/adapter_model.pt": "torchtune" for name in ("llama", "qwen2")},
    **{f"torchtune/{name}/adapter": "peft" for name in ("llama", "qwen2")},
    **{f"mlx/{name}": "mlx" for name in ("linear", "embedding", "as_lora")},
    "mlx of 2024": "mlx_examples",
    "small/fsdp_qlora_bias0": "fsdp_qlora",
    "small/fsdp_qlora_bias1": "fsdp_qlora",
    "small/catid": "catid",
    "small/rasbt": "rasbt",
    "small/vlt5_DoraLinear": "vlt5",
    "small/vlt5_DoraLinear_simple": "vlt5",
    **{f"diffusers/flux_{name}": "diffusers" for name in ("meta", "nometa")},
    **{
        f"lycoris/{p.name}": "kohya" for p in sorted((FIXTURES / "lycoris").iterdir()) if p.is_dir()
    },
    "OneTrainer": "kohya",
    "ai-toolkit": "ai_toolkit",
}
# Shapes of layouts whose trainers are no packages.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "OneTrainer": {
        "diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight": (2, 4),
        "diffusion_model.double_blocks.0.img_mlp.0.lora_B.weight": (6, 2),
        "diffusion_model.double_blocks.0.img_mlp.0.dora_scale": (1, 4),
    },
    "ai-toolkit": {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (2, 4),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (4, 2),
        "transformer.transformer_blocks.0.attn.to_q.magnitude": (4,),
    },
}
# Layouts of a whole model's state dict, in which every tensor belongs to the model.
WHOLE = {"catid", "rasbt", "vlt5"}
KEY = "base_model.model.q"


def adapter(name: str) -> Bundle:
    if name.startswith("small/"):
        shapes = torch.load(FIXTURES / f"{name}.fixture.pt", weights_only=True)["adapter"]
        return bundle({key: tuple(tensor.shape) for key, tensor in shapes.items()}, None)
    if name == "mlx of 2024":
        parameters = {"rank": 4, "alpha": 16, "scale": 10.0}
        config = {"use_dora": True, "lora_layers": 1, "lora_parameters": parameters}
        return bundle(adapter("mlx/linear").tensors, config)
    if name in SHAPES:
        return bundle(SHAPES[name], None)
    folder = FIXTURES / name
    inside = (folder / "adapter", folder / "adapter.safetensors")
    chosen = next((inner for inner in inside if inner.exists()), folder)
    return open_bundle(chosen, allow_pickle=True)


@pytest.mark.parametrize("name", ADAPTERS)
def test_exactly_one_format_detects_it(name: str) -> None:
    held = adapter(name)
    found = [known for known in formats.names() if formats.get(known).detect(held)]
    assert found == [ADAPTERS[name]]
    assert detect(held) == ADAPTERS[name]


def test_every_format_has_an_adapter_here() -> None:
    assert set(ADAPTERS.values()) == set(formats.names())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_tensor_too_much_is_an_error_in_every_format(name: str) -> None:
    held = adapter(name)
    extra = bundle({"some.thing": (3,)}, None).tensors
    more = replace(held, tensors={**held.tensors, **extra})
    plugin = formats.get(ADAPTERS[name])
    assert plugin.read(held).modules
    if ADAPTERS[name] in WHOLE:
        assert plugin.read(more).replaced.keys() - plugin.read(held).replaced == {"some.thing"}
        return
    with pytest.raises(InputError) as caught:
        plugin.read(more)
    assert caught.value.problems == ("some.thing [3] is not understood",)


@pytest.mark.parametrize("name", formats.names())
def test_every_format_has_a_title(name: str) -> None:
    assert formats.get(name).title


def test_neither() -> None:
    held = bundle({"model.norm.weight": (3,)}, {"peft_type": "LOHA"})
    with pytest.raises(InputError, match="not an adapter in a known format") as caught:
        detect(held)
    assert "model.norm.weight" in caught.value.where[1]
    assert ", ".join(formats.names()) in caught.value.hint
    assert "--spec" in caught.value.hint


def test_neither_and_empty() -> None:
    with pytest.raises(InputError, match="not an adapter in a known format") as caught:
        detect(bundle({}, None))
    assert "none" in caught.value.where[1]


def test_both() -> None:
    """A PEFT config beside magnitudes under NVIDIA's name: which scaling rules hold is open."""
    tensors = {
        f"{KEY}.lora_A.weight": (2, 3),
        f"{KEY}.lora_B.weight": (3, 2),
        f"{KEY}.weight_m_wdecomp.weight": (3, 1),
    }
    with pytest.raises(
        InputError, match="more than one adapter format fits: nvidia, peft"
    ) as caught:
        detect(bundle(tensors, {"peft_type": "LORA"}))
    assert "--format nvidia" in caught.value.hint
