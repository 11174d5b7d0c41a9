"""Small image and video models, as their authors name and shape what is in them.

Written down from the authors' code and not from what is tested, with the widths of the models of
diffusers that they become.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Shapes: TypeAlias = dict[str, tuple[int, ...]]

WIDTH, HEAD = 16, 8  # of transformers
BASE, CONTEXT, LAYERS = 4, 6, 2  # of UNets


def biased(modules: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Modules with a weight and a bias."""
    weights = {f"{name}.weight": shape for name, shape in modules.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in modules.items()}


def below(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def each(prefix: str, count: int, shapes: Shapes) -> Shapes:
    return {k: v for i in range(count) for k, v in below(f"{prefix}.{i}", shapes).items()}


def _resnet(into: int, out: int) -> Shapes:
    sizes = {
        "in_layers.0": (into,),
        "in_layers.2": (out, into, 3, 3),
        "emb_layers.1": (out, 4 * BASE),
        "out_layers.0": (out,),
        "out_layers.3": (out, out, 3, 3),
    }
    return biased(sizes | ({"skip_connection": (out, into, 1, 1)} if into != out else {}))


def _spatial_transformer(width: int, depth: int, linear: bool) -> Shapes:
    size = (width, width) if linear else (width, width, 1, 1)
    attention = {
        f"attn{n}.to_{x}.weight": (width, CONTEXT if n == 2 and x != "q" else width)
        for n in (1, 2)
        for x in "qkv"
    }
    block = attention | biased(
        {
            "attn1.to_out.0": (width, width),
            "attn2.to_out.0": (width, width),
            "ff.net.0.proj": (8 * width, width),
            "ff.net.2": (width, 4 * width),
            "norm1": (width,),
            "norm2": (width,),
            "norm3": (width,),
        }
    )
    ends = biased({"norm": (width,), "proj_in": size, "proj_out": size})
    return ends | each("transformer_blocks", depth, block)


def ldm_unet(depths: tuple[int, ...], attended: tuple[bool, ...], linear: bool) -> Shapes:
    """The UNet of openaimodel.py, with so many transformer blocks in each layer of a level."""
    widths = _widths(depths)
    kept, width, number = [BASE], BASE, 1

    def layer(place: str, into: int, level: int) -> Shapes:
        found = below(f"{place}.0", _resnet(into, widths[level]))
        if attended[level]:
            found |= below(f"{place}.1", _spatial_transformer(widths[level], depths[level], linear))
        return found

    out = biased(
        {
            "time_embed.0": (4 * BASE, BASE),
            "time_embed.2": (4 * BASE, 4 * BASE),
            "input_blocks.0.0": (BASE, 4, 3, 3),
            "out.0": (BASE,),
            "out.2": (4, BASE, 3, 3),
        }
    )
    for level in range(len(depths)):
        for _ in range(LAYERS):
            out |= layer(f"input_blocks.{number}", width, level)
            width = widths[level]
            kept.append(width)
            number += 1
        if level < len(depths) - 1:
            out |= biased({f"input_blocks.{number}.0.op": (width, width, 3, 3)})
            kept.append(width)
            number += 1
    out |= below("middle_block.0", _resnet(width, width))
    out |= below("middle_block.1", _spatial_transformer(width, depths[-1], linear))
    out |= below("middle_block.2", _resnet(width, width))
    number = -1
    for level in reversed(range(len(depths))):
        for _ in range(LAYERS + 1):
            number += 1
            out |= layer(f"output_blocks.{number}", width + kept.pop(), level)
            width = widths[level]
        if level:
            place = 2 if attended[level] else 1
            out |= biased({f"output_blocks.{number}.{place}.conv": (width, width, 3, 3)})
    return out


def _widths(depths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(BASE * 2 ** min(level, 2) for level in range(len(depths)))


def diffusers_unet(
    depths: tuple[int, ...], attended: tuple[bool, ...], linear: bool
) -> dict[str, Any]:
    """Configure UNet2DConditionModel as the same."""
    return {
        "sample_size": 8,
        "block_out_channels": _widths(depths),
        "down_block_types": tuple(f"{'CrossAttn' * on}DownBlock2D" for on in attended),
        "up_block_types": tuple(f"{'CrossAttn' * on}UpBlock2D" for on in reversed(attended)),
        "transformer_layers_per_block": depths,
        "use_linear_projection": linear,
        "layers_per_block": LAYERS,
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }


def open_clip(layers: int = 2) -> Shapes:
    """The text half of open_clip's model.py."""
    block = biased(
        {
            "ln_1": (WIDTH,),
            "ln_2": (WIDTH,),
            "mlp.c_fc": (4 * WIDTH, WIDTH),
            "mlp.c_proj": (WIDTH, 4 * WIDTH),
            "attn.out_proj": (WIDTH, WIDTH),
        }
    )
    block |= {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,)}
    return {
        **biased({"ln_final": (WIDTH,)}),
        **each("transformer.resblocks", layers, block),
        "token_embedding.weight": (50, WIDTH),
        "positional_embedding": (7, WIDTH),
        "text_projection": (WIDTH, WIDTH),
    }


def _flux_norms(prefix: str) -> Shapes:
    return {f"{prefix}.{x}_norm.scale": (HEAD,) for x in ("query", "key")}


def _embedder(prefix: str, into: int, first: str = "in_layer", last: str = "out_layer") -> Shapes:
    return biased({f"{prefix}.{first}": (WIDTH, into), f"{prefix}.{last}": (WIDTH, WIDTH)})


def _flux_blocks(*, modulated: bool) -> Shapes:
    double, single = {}, {}
    for kind in ("img", "txt"):
        double |= _flux_norms(f"{kind}_attn.norm") | biased(
            {
                f"{kind}_attn.qkv": (3 * WIDTH, WIDTH),
                f"{kind}_attn.proj": (WIDTH, WIDTH),
                f"{kind}_mlp.0": (4 * WIDTH, WIDTH),
                f"{kind}_mlp.2": (WIDTH, 4 * WIDTH),
            }
        )
        if modulated:
            double |= biased({f"{kind}_mod.lin": (6 * WIDTH, WIDTH)})
    single |= _flux_norms("norm")
    single |= biased({"linear1": (7 * WIDTH, WIDTH), "linear2": (WIDTH, 5 * WIDTH)})
    if modulated:
        single |= biased({"modulation.lin": (3 * WIDTH, WIDTH)})
    ends = biased({"img_in": (WIDTH, 4), "txt_in": (WIDTH, 12), "final_layer.linear": (4, WIDTH)})
    return ends | each("double_blocks", 2, double) | each("single_blocks", 2, single)


def flux(*, guidance: bool) -> Shapes:
    """Flux of black-forest-labs/flux, model.py."""
    return {
        **_flux_blocks(modulated=True),
        **_embedder("time_in", 256),
        **_embedder("vector_in", 10),
        **(_embedder("guidance_in", 256) if guidance else {}),
        **biased({"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}),
    }


def chroma() -> Shapes:
    """Chroma of lodestone-rock/flow, chroma.py."""
    layer = biased({"in_layer": (WIDTH, WIDTH), "out_layer": (WIDTH, WIDTH)})
    return {
        **_flux_blocks(modulated=False),
        **below("distilled_guidance_layer", each("layers", 2, layer)),
        **below("distilled_guidance_layer", each("norms", 2, {"scale": (WIDTH,)})),
        **biased(
            {
                "distilled_guidance_layer.in_proj": (WIDTH, 64),
                "distilled_guidance_layer.out_proj": (WIDTH, WIDTH),
            }
        ),
    }


def flux2() -> Shapes:
    """Flux2 of black-forest-labs/flux2, model.py: no bias at all."""
    double = {
        f"{kind}_{name}.weight": shape
        for kind in ("img", "txt")
        for name, shape in {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.0": (6 * WIDTH, WIDTH),
            "mlp.2": (WIDTH, 3 * WIDTH),
        }.items()
    }
    double |= _flux_norms("img_attn.norm") | _flux_norms("txt_attn.norm")
    single = {"linear1.weight": (9 * WIDTH, WIDTH), "linear2.weight": (WIDTH, 4 * WIDTH)}
    return {
        **each("double_blocks", 2, double),
        **each("single_blocks", 2, single | _flux_norms("norm")),
        "img_in.weight": (WIDTH, 4),
        "txt_in.weight": (WIDTH, 12),
        "time_in.in_layer.weight": (WIDTH, 256),
        "time_in.out_layer.weight": (WIDTH, WIDTH),
        "guidance_in.in_layer.weight": (WIDTH, 256),
        "guidance_in.out_layer.weight": (WIDTH, WIDTH),
        "double_stream_modulation_img.lin.weight": (6 * WIDTH, WIDTH),
        "double_stream_modulation_txt.lin.weight": (6 * WIDTH, WIDTH),
        "single_stream_modulation.lin.weight": (3 * WIDTH, WIDTH),
        "final_layer.linear.weight": (4, WIDTH),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
    }


def sd3(*, dual: bool) -> Shapes:
    """MMDiT of Stability-AI/sd3.5, mmditx.py; with a second attention in its first block."""
    out = {
        **_embedder("t_embedder", 256, "mlp.0", "mlp.2"),
        **_embedder("y_embedder", 10, "mlp.0", "mlp.2"),
        **biased(
            {
                "x_embedder.proj": (WIDTH, 4, 2, 2),
                "context_embedder": (WIDTH, 12),
                "final_layer.linear": (16, WIDTH),
                "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
            }
        ),
        "pos_embed": (1, 36, WIDTH),
    }
    for number in range(3):
        for side in ("x", "context"):
            before = f"joint_blocks.{number}.{side}_block"
            is_last, is_dual = (side, number) == ("context", 2), dual and (side, number) == ("x", 0)
            sizes = {"attn.qkv": (3 * WIDTH, WIDTH)}
            sizes["adaLN_modulation.1"] = ((2 if is_last else 9 if is_dual else 6) * WIDTH, WIDTH)
            if not is_last:
                sizes |= {"attn.proj": (WIDTH, WIDTH)}
                sizes |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
            if is_dual:
                sizes |= {"attn2.qkv": (3 * WIDTH, WIDTH), "attn2.proj": (WIDTH, WIDTH)}
            out |= below(before, biased(sizes))
            for name in ("attn", "attn2") if is_dual else ("attn",):
                norms: Shapes = {f"{name}.ln_{x}.weight": (HEAD,) for x in "qk"} if dual else {}
                out |= below(before, norms)
    return out


def wan(*, image: bool, vace: bool) -> Shapes:
    """WanModel of Wan-Video/Wan2.1, model.py, and vace_model.py."""
    square = (WIDTH, WIDTH)
    sizes = {f"{kind}_attn.{x}": square for kind in ("self", "cross") for x in "qkvo"}
    sizes |= {"norm3": (WIDTH,), "ffn.0": (32, WIDTH), "ffn.2": (WIDTH, 32)}
    exact: Shapes = {
        f"{kind}_attn.norm_{x}.weight": (WIDTH,) for kind in ("self", "cross") for x in "qk"
    }
    if image:
        sizes |= {"cross_attn.k_img": square, "cross_attn.v_img": square}
        exact["cross_attn.norm_k_img.weight"] = (WIDTH,)
    block = biased(sizes) | exact | {"modulation": (1, 6, WIDTH)}
    out = {
        **each("blocks", 2, block),
        **_embedder("time_embedding", 256, "0", "2"),
        **_embedder("text_embedding", 12, "0", "2"),
        **biased(
            {
                "patch_embedding": (WIDTH, 4, 1, 2, 2),
                "time_projection.1": (6 * WIDTH, WIDTH),
                "head.head": (16, WIDTH),
            }
        ),
        "head.modulation": (1, 2, WIDTH),
    }
    if image:
        sizes = {"0": (20,), "1": (20, 20), "3": (WIDTH, 20), "4": (WIDTH,)}
        out |= below("img_emb.proj", biased(sizes))
    if vace:
        more = each("vace_blocks", 2, block | biased({"after_proj": square}))
        out |= more | biased({"vace_blocks.0.before_proj": square})
        out |= biased({"vace_patch_embedding": (WIDTH, 12, 1, 2, 2)})
    return out


def hunyuan_video() -> Shapes:
    """HYVideoDiffusionTransformer of Tencent/HunyuanVideo, models.py."""
    double: Shapes = {}
    for kind in ("img", "txt"):
        double |= {f"{kind}_attn_{x}_norm.weight": (HEAD,) for x in "qk"}
        double |= biased(
            {
                f"{kind}_mod.linear": (6 * WIDTH, WIDTH),
                f"{kind}_attn_qkv": (3 * WIDTH, WIDTH),
                f"{kind}_attn_proj": (WIDTH, WIDTH),
                f"{kind}_mlp.fc1": (4 * WIDTH, WIDTH),
                f"{kind}_mlp.fc2": (WIDTH, 4 * WIDTH),
            }
        )
    single = biased(
        {
            "linear1": (7 * WIDTH, WIDTH),
            "linear2": (WIDTH, 5 * WIDTH),
            "modulation.linear": (3 * WIDTH, WIDTH),
        }
    )
    refiner = biased(
        {
            "norm1": (WIDTH,),
            "norm2": (WIDTH,),
            "self_attn_qkv": (3 * WIDTH, WIDTH),
            "self_attn_proj": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
            "adaLN_modulation.1": (2 * WIDTH, WIDTH),
        }
    )
    return {
        **each("double_blocks", 2, double),
        **each("single_blocks", 2, single | {f"{x}_norm.weight": (HEAD,) for x in "qk"}),
        **each("txt_in.individual_token_refiner.blocks", 2, refiner),
        **_embedder("txt_in.t_embedder", 256, "mlp.0", "mlp.2"),
        **_embedder("txt_in.c_embedder", 12, "linear_1", "linear_2"),
        **_embedder("time_in", 256, "mlp.0", "mlp.2"),
        **_embedder("guidance_in", 256, "mlp.0", "mlp.2"),
        **_embedder("vector_in", 10),
        **biased(
            {
                "txt_in.input_embedder": (WIDTH, 12),
                "img_in.proj": (WIDTH, 4, 1, 2, 2),
                "final_layer.linear": (16, WIDTH),
                "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
            }
        ),
    }


def _next_dit(
    queries: int, keys: int, middle: int, modulation: Mapping[str, tuple[int, ...]]
) -> Shapes:
    """The blocks of Lumina 2 and Z-Image; those of the context are not modulated."""
    block: Shapes = {
        "attention.qkv.weight": (queries + 2 * keys, WIDTH),
        "attention.out.weight": (WIDTH, queries),
        "attention.q_norm.weight": (HEAD,),
        "attention.k_norm.weight": (HEAD,),
        "feed_forward.w1.weight": (middle, WIDTH),
        "feed_forward.w2.weight": (WIDTH, middle),
        "feed_forward.w3.weight": (middle, WIDTH),
        "attention_norm1.weight": (WIDTH,),
        "attention_norm2.weight": (WIDTH,),
        "ffn_norm1.weight": (WIDTH,),
        "ffn_norm2.weight": (WIDTH,),
    }
    return {
        **each("layers", 2, block | biased(modulation)),
        **each("noise_refiner", 2, block | biased(modulation)),
        **each("context_refiner", 2, block),
        **biased({"cap_embedder.1": (WIDTH, 12), "x_embedder": (WIDTH, 16)}),
        "cap_embedder.0.weight": (12,),
        **biased({"final_layer.linear": (16, WIDTH)}),
        **biased({"final_layer.adaLN_modulation.1": (WIDTH, WIDTH)}),
        "norm_final.weight": (WIDTH,),  # never used
    }


def lumina2() -> Shapes:
    """NextDiT of Alpha-VLLM/Lumina-Image-2.0, model.py, with half as many heads of keys."""
    modulation = {"adaLN_modulation.1": (4 * WIDTH, WIDTH)}
    time = _embedder("t_embedder", 256, "mlp.0", "mlp.2")
    return _next_dit(WIDTH, WIDTH // 2, 64, modulation) | time


def z_image() -> Shapes:
    """What ComfyUI has of Tongyi-MAI/Z-Image, with the refiner of Omni."""
    found = _next_dit(WIDTH, WIDTH, int(WIDTH / 3 * 8), {"adaLN_modulation.0": (4 * WIDTH, WIDTH)})
    refiner = {
        name.replace("context", "siglip"): shape
        for name, shape in found.items()
        if name.startswith("context_refiner.")
    }
    time = biased({"t_embedder.mlp.0": (1024, 256), "t_embedder.mlp.2": (WIDTH, 1024)})
    siglip = {**biased({"siglip_embedder.1": (WIDTH, 12)}), "siglip_embedder.0.weight": (12,)}
    pads: Shapes = {f"{x}_pad_token": (1, WIDTH) for x in ("x", "cap", "siglip")}
    return found | refiner | time | siglip | pads
