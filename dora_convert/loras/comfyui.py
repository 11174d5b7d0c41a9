"""A file for ComfyUI, which knows a module by one or two of the names that are about.

UNets go by kohya's names, other denoisers by diffusers' after `transformer.` or by their authors'
after `diffusion_model.`, CLIP by diffusers'. Source: ComfyUI of August 2026, `comfy/lora.py`,
`comfy/weight_adapter/lora.py`: without an alpha the scale is 1.
"""

from __future__ import annotations

from dora_convert.core.lora import LoraLayer
from dora_convert.core.pairs import Factor, LoraFile, Pair
from dora_convert.core.tensors import TensorSpec
from dora_convert.errors import MismatchError
from dora_convert.planning.image_loras import ImagePlace, image_place
from dora_convert.planning.lora import Lora, factor_shapes
from dora_convert.storage.pairs import safetensors_file

__all__ = ["FORMAT"]


class _ComfyUI:
    title = "ComfyUI"

    def lay_out(self, lora: Lora) -> LoraFile:
        names = {layer.path: _name(image_place(layer.path, lora)) for layer in lora.layers}
        lost = [path for path, name in names.items() if name is None]
        if lost:
            raise MismatchError(
                "ComfyUI has no name for these modules",
                problems=lost,
                hint="Leave them out with --exclude GLOB. The base is the folder of a pipeline or "
                "of its denoiser with config.json, or the file that ComfyUI itself loads.",
            )
        pairs = [_pair(layer, names[layer.path] or "", lora) for layer in lora.layers]
        return safetensors_file("lora.safetensors", pairs)


def _name(place: ImagePlace | None) -> str | None:
    if place is None:
        return None
    component, path = place.component, place.path
    if component.startswith("text_encoder"):
        if path.startswith("encoder.block."):
            return f"text_encoders.t5xxl.transformer.{path}"
        return None if place.is_original else f"{component}.{path}"
    if place.is_original:
        return f"diffusion_model.{path}"
    if component in ("unet", "prior"):
        return f"lora_{'prior_' * (component == 'prior')}unet_{path.replace('.', '_')}"
    return f"{component}.{path}"


def _pair(layer: LoraLayer, name: str, lora: Lora) -> Pair:
    down, up = factor_shapes(layer, lora.ranks[layer.path])
    parts = ("lora_down", "lora_up") if "." not in name else ("lora_A", "lora_B")
    return Pair(
        layer,
        Factor(TensorSpec(f"{name}.{parts[0]}.weight", lora.dtype, down)),
        Factor(TensorSpec(f"{name}.{parts[1]}.weight", lora.dtype, up)),
    )


FORMAT = _ComfyUI()
