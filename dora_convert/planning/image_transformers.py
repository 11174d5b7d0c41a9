"""What diffusion transformers call their tensors, for their authors and in diffusers.

Every table says the same as the converter of diffusers 0.42 that is named above it
(diffusers/loaders/single_file_utils.py).
"""

from __future__ import annotations

from dora_convert.planning.image_rules import SAME, Architecture, Group, Made, Rules

__all__ = ["TRANSFORMERS"]

_EMBEDDER: Rules = {"0": "linear_1", "2": "linear_2"}
_ATTENTION = "attn.to_q attn.to_k attn.to_v"
_ADDED = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
# The authors compute shift and scale, in this order; AdaLayerNormContinuous scale and shift.
_NORM_OUT = Made("norm_out.linear", swapped=True)
# Queries, keys and values have the width of the model; what is left is the MLP.
_WITH_MLP = Made(f"{_ATTENTION} proj_mlp", square=3)

# convert_flux_transformer_checkpoint_to_diffusers
_LAYERS: Rules = {"in_layer": "linear_1", "out_layer": "linear_2"}
_FLUX_TOP: Rules = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": _NORM_OUT,
}
_FLUX_ATTENTION: Rules = {
    "img_attn.qkv": _ATTENTION,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_FLUX_BLOCKS = (
    Group(
        "double_blocks.#",
        "transformer_blocks.#",
        {
            **_FLUX_ATTENTION,
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
    ),
    Group(
        "single_blocks.#",
        "single_transformer_blocks.#",
        {
            "modulation.lin": "norm.linear",
            "linear1": _WITH_MLP,
            "linear2": "proj_out",
            "norm.query_norm.scale": "attn.norm_q.weight",
            "norm.key_norm.scale": "attn.norm_k.weight",
        },
    ),
)
_FLUX = Architecture(
    ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "txt_in.weight"),
    (
        "single_transformer_blocks.0.proj_mlp.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "context_embedder.weight",
    ),
    _FLUX_TOP,
    (
        Group("time_in", "time_text_embed.timestep_embedder", _LAYERS),
        Group("vector_in", "time_text_embed.text_embedder", _LAYERS),
        Group("guidance_in", "time_text_embed.guidance_embedder", _LAYERS),
        *_FLUX_BLOCKS,
    ),
)

# convert_sd3_transformer_checkpoint_to_diffusers
_MLP: Rules = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
_SD3 = Architecture(
    ("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"),
    (
        "transformer_blocks.0.attn.add_q_proj.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "pos_embed.proj.weight",
    ),
    {
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": _NORM_OUT,
    },
    (
        Group("t_embedder", "time_text_embed.timestep_embedder", _MLP),
        Group("y_embedder", "time_text_embed.text_embedder", _MLP),
        Group(
            "joint_blocks.#",
            "transformer_blocks.#",
            {
                "x_block.attn.qkv": _ATTENTION,
                "x_block.attn.proj": "attn.to_out.0",
                "x_block.attn.ln_q": "attn.norm_q",
                "x_block.attn.ln_k": "attn.norm_k",
                "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
                "x_block.attn2.proj": "attn2.to_out.0",
                "x_block.attn2.ln_q": "attn2.norm_q",
                "x_block.attn2.ln_k": "attn2.norm_k",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.attn.qkv": _ADDED,
                "context_block.attn.proj": "attn.to_add_out",
                "context_block.attn.ln_q": "attn.norm_added_q",
                "context_block.attn.ln_k": "attn.norm_added_k",
                "context_block.adaLN_modulation.1": "norm1_context.linear",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
            },
        ),
        # Nothing comes after the last block's context: its norm is one as at the end.
        Group(
            "joint_blocks.$.context_block",
            "transformer_blocks.$",
            {"adaLN_modulation.1": Made("norm1_context.linear", swapped=True)},
        ),
    ),
)

# convert_wan_transformer_to_diffusers
_WAN_BLOCK: Rules = {
    **{
        f"{theirs}.{name}": f"{ours}.{path}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, path in (
            *((x, f"to_{x}") for x in "qkv"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    # The norm before cross-attention, the only one of the three with a weight.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_WAN = Architecture(
    ("blocks.0.self_attn.q.weight", "time_projection.1.weight"),
    ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight"),
    {
        "time_projection.1": "condition_embedder.time_proj",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    },
    (
        Group("time_embedding", "condition_embedder.time_embedder", _EMBEDDER),
        Group("text_embedding", "condition_embedder.text_embedder", _EMBEDDER),
        Group(
            "img_emb.proj",
            "condition_embedder.image_embedder",
            {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"},
        ),
        Group("blocks.#", "blocks.#", _WAN_BLOCK),
        Group(
            "vace_blocks.#",
            "vace_blocks.#",
            {**_WAN_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"},
        ),
    ),
)

# convert_flux2_transformer_checkpoint_to_diffusers
_FLUX2 = Architecture(
    ("double_stream_modulation_img.lin.weight", "single_blocks.0.linear1.weight"),
    (
        "double_stream_modulation_img.linear.weight",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
    ),
    _FLUX_TOP,
    (
        Group("time_in", "time_guidance_embed.timestep_embedder", _LAYERS),
        Group("guidance_in", "time_guidance_embed.guidance_embedder", _LAYERS),
        *(
            Group(name, name, {"lin": "linear"})
            for name in (
                "double_stream_modulation_img",
                "double_stream_modulation_txt",
                "single_stream_modulation",
            )
        ),
        Group(
            "double_blocks.#",
            "transformer_blocks.#",
            {
                **_FLUX_ATTENTION,
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
        ),
        Group(
            "single_blocks.#",
            "single_transformer_blocks.#",
            {
                "linear1": "attn.to_qkv_mlp_proj",
                "linear2": "attn.to_out",
                "norm.query_norm.scale": "attn.norm_q.weight",
                "norm.key_norm.scale": "attn.norm_k.weight",
            },
        ),
    ),
)

# convert_chroma_transformer_checkpoint_to_diffusers: Flux without what another network predicts
_CHROMA_LAYERS = "distilled_guidance_layer.layers.#"
_CHROMA_NORMS = "distilled_guidance_layer.norms.#"
_CHROMA = Architecture(
    ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"),
    ("distilled_guidance_layer.in_proj.weight", "single_transformer_blocks.0.proj_mlp.weight"),
    _FLUX_TOP,
    (
        Group(_CHROMA_LAYERS, _CHROMA_LAYERS, _LAYERS),
        Group(_CHROMA_NORMS, _CHROMA_NORMS, {"scale": "weight"}),
        *_FLUX_BLOCKS,
    ),
)

# convert_hunyuan_video_transformer_to_diffusers
_REFINER = "context_embedder.token_refiner.refiner_blocks.#"
_HUNYUAN_VIDEO = Architecture(
    ("double_blocks.0.img_attn_qkv.weight", "txt_in.input_embedder.weight"),
    (
        _REFINER.replace("#", "0") + ".attn.to_q.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ),
    {
        "img_in.proj": "x_embedder.proj",
        "txt_in.input_embedder": "context_embedder.proj_in",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": _NORM_OUT,
    },
    (
        Group("time_in", "time_text_embed.timestep_embedder", _MLP),
        Group("guidance_in", "time_text_embed.guidance_embedder", _MLP),
        Group("vector_in", "time_text_embed.text_embedder", _LAYERS),
        Group("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", _MLP),
        Group("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", SAME),
        Group(
            "txt_in.individual_token_refiner.blocks.#",
            _REFINER,
            {
                "norm1": "norm1",
                "norm2": "norm2",
                "self_attn_qkv": _ATTENTION,
                "self_attn_proj": "attn.to_out.0",
                "adaLN_modulation.1": "norm_out.linear",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
            },
        ),
        Group(
            "double_blocks.#",
            "transformer_blocks.#",
            {
                "img_mod.linear": "norm1.linear",
                "txt_mod.linear": "norm1_context.linear",
                "img_attn_qkv": _ATTENTION,
                "txt_attn_qkv": _ADDED,
                "img_attn_proj": "attn.to_out.0",
                "txt_attn_proj": "attn.to_add_out",
                "img_attn_q_norm": "attn.norm_q",
                "img_attn_k_norm": "attn.norm_k",
                "txt_attn_q_norm": "attn.norm_added_q",
                "txt_attn_k_norm": "attn.norm_added_k",
                "img_mlp.fc1": "ff.net.0.proj",
                "img_mlp.fc2": "ff.net.2",
                "txt_mlp.fc1": "ff_context.net.0.proj",
                "txt_mlp.fc2": "ff_context.net.2",
            },
        ),
        Group(
            "single_blocks.#",
            "single_transformer_blocks.#",
            {
                "modulation.linear": "norm.linear",
                "linear1": _WITH_MLP,
                "linear2": "proj_out",
                "q_norm": "attn.norm_q",
                "k_norm": "attn.norm_k",
            },
        ),
    ),
)

# convert_z_image_transformer_checkpoint_to_diffusers
_PARTS_OF_NEXT_DIT = ("layers.#", "noise_refiner.#", "context_refiner.#")
_Z_IMAGE = Architecture(
    ("layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.0.weight", "x_embedder.weight"),
    ("layers.0.attention.to_q.weight", "all_x_embedder.2-1.weight"),
    {"x_embedder": "all_x_embedder.2-1"},
    (
        Group("final_layer", "all_final_layer.2-1", SAME),
        *(
            Group(
                f"{part}.attention",
                f"{part}.attention",
                {
                    "qkv": "to_q to_k to_v",
                    "out": "to_out.0",
                    "q_norm": "norm_q",
                    "k_norm": "norm_k",
                },
            )
            for part in (*_PARTS_OF_NEXT_DIT, "siglip_refiner.#")
        ),
    ),
)

# convert_lumina2_to_diffusers
_LUMINA2 = Architecture(
    (
        "layers.0.attention.qkv.weight",
        "layers.0.adaLN_modulation.1.weight",
        "cap_embedder.0.weight",
    ),
    ("layers.0.attn.to_q.weight", "time_caption_embed.caption_embedder.0.weight"),
    {
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    },
    (
        Group("t_embedder", "time_caption_embed.timestep_embedder", _MLP),
        Group("cap_embedder", "time_caption_embed.caption_embedder", SAME),
        *(
            Group(
                part,
                part,
                {
                    # Fewer heads of keys and values than of queries.
                    "attention.qkv": Made(_ATTENTION, square=1),
                    "attention.out": "attn.to_out.0",
                    "attention.q_norm": "attn.norm_q",
                    "attention.k_norm": "attn.norm_k",
                    "feed_forward.w1": "feed_forward.linear_1",
                    "feed_forward.w2": "feed_forward.linear_2",
                    "feed_forward.w3": "feed_forward.linear_3",
                    "adaLN_modulation.1": "norm1.linear",
                    "attention_norm1": "norm1" if part == "context_refiner.#" else "norm1.norm",
                    "attention_norm2": "norm2",
                },
            )
            for part in _PARTS_OF_NEXT_DIT
        ),
    ),
)

TRANSFORMERS = (
    _FLUX,
    _SD3,
    _WAN,
    _FLUX2,
    _CHROMA,
    _HUNYUAN_VIDEO,
    _Z_IMAGE,
    _LUMINA2,
)
