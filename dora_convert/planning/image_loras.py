"""What the parts of an image model are called in the files of LoRAs for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from dora_convert.core.tensors import COMPONENT_MARK
from dora_convert.planning.lora import Lora, spelled

__all__ = ["ImagePlace", "image_place"]

# Of files with all models in one, the names that diffusers' pipelines have for them.
_FILES: Final = (
    (re.compile(r"model\.diffusion_model\."), ""),
    (re.compile(r"cond_stage_model\.(?:transformer|model)\."), "text_encoder"),
    (re.compile(r"conditioner\.embedders\.0\.(?:transformer|model)\."), "text_encoder"),
    (re.compile(r"conditioner\.embedders\.1\.(?:transformer|model)\."), "text_encoder_2"),
    (re.compile(r"text_encoders\.clip_l\.transformer\."), "text_encoder"),
    (re.compile(r"text_encoders\.clip_g\.transformer\."), "text_encoder_2"),
)
_UNET: Final = ("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.")
# transformers 5 has done without the first name of CLIP's; whoever loads LoRAs knows it with it.
_CLIP: Final = "text_model."
_FLAT_CLIP: Final = ("encoder.layers.", "embeddings.")


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """A module of a pipeline: its `component` and its path there, both as diffusers has them.

    `is_original`: the path is in the names of the model's authors; a denoiser's component is then
    "", since the authors' files have no name for it.
    """

    component: str
    path: str
    is_original: bool


def image_place(path: str, lora: Lora) -> ImagePlace | None:
    """Where a module lies; None in a base that is no image model."""
    name = spelled(path, lora.names)
    component, rest = _component(name, lora)
    if component is None:
        return None
    if rest.startswith(_FLAT_CLIP):
        rest = _CLIP + rest
    is_own = _is_stored(name, lora)
    if COMPONENT_MARK in name or lora.config:
        # The base has diffusers' names, and what it does not have as it is the authors'.
        return ImagePlace(component if is_own else "", rest, not is_own)
    if component:
        return ImagePlace(component, rest, is_original=not rest.startswith(_CLIP))
    if is_own:
        return ImagePlace("", rest, is_original=True)
    return ImagePlace("unet" if rest.startswith(_UNET) else "transformer", rest, is_original=False)


def _component(name: str, lora: Lora) -> tuple[str | None, str]:
    folder, mark, rest = name.partition(COMPONENT_MARK)
    if mark:
        return folder, rest
    kind = str(lora.config.get("_class_name", ""))
    if kind.startswith("UNet"):
        return "unet", name
    if "Transformer" in kind:
        return "transformer", name
    for pattern, component in _FILES:
        match = pattern.match(name)
        if match is not None:
            return component, name[match.end() :]
    return (None if lora.config else "", name)


def _is_stored(name: str, lora: Lora) -> bool:
    """Whether the base has the module's weight under that name, as it is."""
    origin = lora.names.origins.get(f"{name}.weight")
    return isinstance(origin, tuple) and len(origin) == 1 and origin[0].tensor == f"{name}.weight"
