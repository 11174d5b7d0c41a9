"""The one file that diffusers saves a LoRA in.

Without metadata diffusers takes alpha for the rank of each pair, which is scale 1
(diffusers/loaders/peft.py, utils/peft_utils.py).
"""

from __future__ import annotations

from dora_convert.core.lora import LoraLayer
from dora_convert.core.pairs import Factor, LoraFile, Pair
from dora_convert.core.tensors import TensorSpec
from dora_convert.errors import MismatchError
from dora_convert.planning.image_loras import image_place
from dora_convert.planning.lora import Lora, factor_shapes
from dora_convert.storage.pairs import safetensors_file

__all__ = ["FORMAT"]


_TEXT = ("lora_linear_layer.down", "lora_linear_layer.up")


class _Diffusers:
    title = "diffusers"

    def lay_out(self, lora: Lora) -> LoraFile:
        names = {layer.path: _name(layer, lora) for layer in lora.layers}
        lost = [path for path, name in names.items() if name is None]
        if lost:
            raise MismatchError(
                "diffusers has no name for these modules",
                where=f"_class_name in the base's config.json: "
                f"{lora.config.get('_class_name', 'missing')}",
                problems=lost,
                hint="The base is the folder of a pipeline, or of its unet or transformer with "
                "config.json; modules that are fused there are not in diffusers.",
            )
        pairs = [_pair(layer, names[layer.path] or "", lora) for layer in lora.layers]
        return safetensors_file("pytorch_lora_weights.safetensors", pairs)


def _name(layer: LoraLayer, lora: Lora) -> str | None:
    """The component's name comes first: pipelines drop what has another one."""
    place = image_place(layer.path, lora)
    if place is None or place.is_original or not place.component:
        return None
    return f"{place.component}.{place.path}"


def _pair(layer: LoraLayer, name: str, lora: Lora) -> Pair:
    down, up = factor_shapes(layer, lora.ranks[layer.path])
    # Text encoders have names of their own (DIFFUSERS_TO_PEFT in utils/state_dict_utils.py).
    is_text = name.startswith("text_encoder")
    first, second = _TEXT if is_text else ("lora_A", "lora_B")
    return Pair(
        layer,
        Factor(TensorSpec(f"{name}.{first}.weight", lora.dtype, down)),
        Factor(TensorSpec(f"{name}.{second}.weight", lora.dtype, up)),
    )


FORMAT = _Diffusers()
