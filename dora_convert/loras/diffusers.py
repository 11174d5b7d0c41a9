"""The one file that diffusers saves a LoRA in, which ComfyUI and others read too.

Without metadata diffusers takes alpha for the rank of each pair, which is scale 1
(diffusers/loaders/peft.py, utils/peft_utils.py).
"""

from __future__ import annotations

from dora_convert.core.lora import LoraLayer
from dora_convert.core.pairs import Factor, LoraFile, Pair
from dora_convert.core.tensors import TensorSpec
from dora_convert.errors import MismatchError
from dora_convert.planning.lora import Lora, factor_shapes, spelled
from dora_convert.storage.pairs import safetensors_file

__all__ = ["FORMAT"]


class _Diffusers:
    title = "diffusers"

    def lay_out(self, lora: Lora) -> LoraFile:
        component = _component(lora)
        pairs = [_pair(component, layer, lora) for layer in lora.layers]
        return safetensors_file("pytorch_lora_weights.safetensors", pairs)


def _component(lora: Lora) -> str:
    """The name that pipelines give to the model: their loaders drop what has another prefix."""
    name = str(lora.config.get("_class_name", ""))
    if name.startswith("UNet"):
        return "unet"
    if "Transformer" in name:
        return "transformer"
    raise MismatchError(
        "the base is no denoiser of diffusers",
        where=f"_class_name in its config.json: {name or 'missing'}",
        hint="Give the folder unet or transformer of the pipeline as --base, with its config.json.",
    )


def _pair(component: str, layer: LoraLayer, lora: Lora) -> Pair:
    name = f"{component}.{spelled(layer.path, lora.names)}"
    down, up = factor_shapes(layer, lora.ranks[layer.path])
    return Pair(
        layer,
        Factor(TensorSpec(f"{name}.lora_A.weight", lora.dtype, down)),
        Factor(TensorSpec(f"{name}.lora_B.weight", lora.dtype, up)),
    )


FORMAT = _Diffusers()
