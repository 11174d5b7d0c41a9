"""What tensors of Stable Diffusion up to SDXL, UNet and OpenCLIP, are called by LDM and diffusers.

LDM counts the layers of the UNet (`input_blocks.4`, openaimodel.py), diffusers the blocks between
samplers and the layers in each (`down_blocks.1.resnets.0`). How many there are is read off the
names; convert_ldm_unet_checkpoint (diffusers/loaders/single_file_utils.py) has them from a config.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dora_convert.planning.image_rules import SAME, Architecture, Group, Made, Rules

__all__ = ["OPEN_CLIPS", "UNET"]

_RESNET: Rules = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_DOWN: Rules = {"op": "conv"}
_UP: Rules = {"conv": "conv"}
_EMBEDDER: Rules = {"0": "linear_1", "2": "linear_2"}


@dataclass(slots=True)
class _Block:
    """What ends with a sampler, or with the last layer."""

    attentions: list[bool] = field(default_factory=list)  # of each layer: has it one
    is_sampled: bool = False


def _blocks(names: Iterable[str], is_ldm: bool) -> Iterator[Group]:
    """Rules for the layers on the way down and up."""
    down, up = _of_ldm(names) if is_ldm else _of_diffusers(names)
    number = 1  # `input_blocks.0` is the first convolution
    for level, block in enumerate(down):
        ours = f"down_blocks.{level}"
        yield from _layers(block, "input_blocks", number, ours)
        number += len(block.attentions)
        if block.is_sampled:
            # A layer of its own here; on the way up it is the end of one.
            yield Group(f"input_blocks.{number}.0", f"{ours}.downsamplers.0", _DOWN)
            number += 1
    number = 0
    for level, block in enumerate(up):
        ours = f"up_blocks.{level}"
        yield from _layers(block, "output_blocks", number, ours)
        number += len(block.attentions)
        if block.is_sampled:
            place = 1 + sum(block.attentions[-1:])
            yield Group(f"output_blocks.{number - 1}.{place}", f"{ours}.upsamplers.0", _UP)


def _layers(block: _Block, theirs: str, number: int, ours: str) -> Iterator[Group]:
    for layer, has_attention in enumerate(block.attentions):
        yield Group(f"{theirs}.{number + layer}.0", f"{ours}.resnets.{layer}", _RESNET)
        if has_attention:
            yield Group(f"{theirs}.{number + layer}.1", f"{ours}.attentions.{layer}", SAME)


def _of_ldm(names: Iterable[str]) -> list[list[_Block]]:
    """A layer is known by what its parts hold."""
    pattern = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.\d+\.([a-z_]+)\.")
    layers: dict[str, dict[int, set[str]]] = {"input_blocks": {}, "output_blocks": {}}
    for match in filter(None, map(pattern.match, names)):
        layers[match[1]].setdefault(int(match[2]), set()).add(match[3])
    out = []
    for numbered in layers.values():
        blocks = [_Block()]
        for _, held in sorted(numbered.items()):
            if "in_layers" in held:
                blocks[-1].attentions.append("transformer_blocks" in held)
            if held & {"op", "conv"}:
                blocks[-1].is_sampled = True
                blocks.append(_Block())
        out.append(blocks)
    return out


def _of_diffusers(names: Iterable[str]) -> list[list[_Block]]:
    pattern = re.compile(r"(down|up)_blocks\.(\d+)\.(resnet|attention|\w+sampler)s\.(\d+)\.")
    found: dict[str, dict[int, dict[str, set[int]]]] = {"down": {}, "up": {}}
    for match in filter(None, map(pattern.match, names)):
        parts = found[match[1]].setdefault(int(match[2]), defaultdict(set))
        parts[match[3]].add(int(match[4]))
    return [
        [
            _Block(
                [layer in parts["attention"] for layer in sorted(parts["resnet"])],
                is_sampled=bool(parts[f"{way}sampler"]),
            )
            for _, parts in sorted(levels.items())
        ]
        for way, levels in found.items()
    ]


UNET = Architecture(
    ("input_blocks.0.0.weight", "time_embed.0.weight", "output_blocks.0.0.in_layers.0.weight"),
    ("conv_in.weight", "time_embedding.linear_1.weight", "up_blocks.0.resnets.0.norm1.weight"),
    {
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "label_emb.weight": "class_embedding.weight",
    },
    (
        Group("time_embed", "time_embedding", _EMBEDDER),
        # The one is of SDXL, the other of SD 2 unCLIP: its config says which, and no name does.
        Group("label_emb.0", "add_embedding", _EMBEDDER),
        Group("label_emb.0", "class_embedding", _EMBEDDER),
        Group("middle_block.0", "mid_block.resnets.0", _RESNET),
        Group("middle_block.1", "mid_block.attentions.0", SAME),
        Group("middle_block.2", "mid_block.resnets.1", _RESNET),
    ),
    _blocks,
)


def _open_clip(below: str) -> Architecture:
    """What convert_open_clip_checkpoint knows, with its names of transformers below a prefix."""
    return Architecture(
        ("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"),
        (
            f"{below}encoder.layers.0.self_attn.q_proj.weight",
            f"{below}embeddings.token_embedding.weight",
        ),
        {
            "token_embedding": f"{below}embeddings.token_embedding",
            "positional_embedding": f"{below}embeddings.position_embedding.weight",
            "ln_final": f"{below}final_layer_norm",
            "text_projection": Made("text_projection.weight", transposed=True),
        },
        (
            Group(
                "transformer.resblocks.#",
                f"{below}encoder.layers.#",
                {
                    "ln_1": "layer_norm1",
                    "ln_2": "layer_norm2",
                    "mlp.c_fc": "mlp.fc1",
                    "mlp.c_proj": "mlp.fc2",
                    "attn.out_proj": "self_attn.out_proj",
                    "attn.in_proj_weight": " ".join(f"self_attn.{x}_proj.weight" for x in "qkv"),
                    "attn.in_proj_bias": " ".join(f"self_attn.{x}_proj.bias" for x in "qkv"),
                },
            ),
        ),
    )


# transformers 5 saves a CLIPTextModel without the prefix, and one with a projection with it.
OPEN_CLIPS = (_open_clip("text_model."), _open_clip(""))
