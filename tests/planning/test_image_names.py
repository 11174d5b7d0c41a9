from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, TypeAlias

import pytest
import torch

from dora_convert.planning.image_names import other_names
from dora_convert.planning.names import Origin, Rows, Unsupported
from tests.planning import image_models as models
from tests.planning.image_models import Shapes, biased

Tensors: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model, and what diffusers makes of it."""

    original: Shapes
    converter: str
    model: str
    config: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the converter
    widths: Mapping[int, int] = field(default_factory=dict)  # that it takes for granted
    unused: tuple[str, ...] = ()


def unet(
    depths: tuple[int, ...],
    attended: tuple[bool, ...],
    more: Shapes | None = None,
    linear: bool = True,
    **config: Any,
) -> Case:
    shapes = models.ldm_unet(depths, attended, linear) | (more or {})
    config = models.diffusers_unet(depths, attended, linear) | config
    converter = "convert_ldm_unet_checkpoint"
    return Case(shapes, converter, "UNet2DConditionModel", config, {"config": config})


def transformer(
    name: str, shapes: Shapes, model: str, *, unused: tuple[str, ...] = (), **config: Any
) -> Case:
    converter = f"convert_{name}_to_diffusers"
    widths = {3072: models.WIDTH, 2304: models.WIDTH, 768: models.WIDTH // 2}
    return Case(shapes, converter, model, config, widths=widths, unused=unused)


YES, NO = True, False
LABELLED = r"(add|class)_embedding\.(?=linear)"
LABEL = biased({"label_emb.0.0": (16, 10), "label_emb.0.2": (16, 16)})
HEADS = {"num_attention_heads": 2, "attention_head_dim": models.HEAD}
FLUX: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 12,
}
SD3: dict[str, Any] = {
    **HEADS,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "caption_projection_dim": models.WIDTH,
    "pos_embed_max_size": 6,
}
WAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "ffn_dim": 32,
    "num_layers": 2,
}
IMAGE = {"image_dim": 20, "added_kv_proj_dim": models.WIDTH}
NEXT_DIT: dict[str, Any] = {"in_channels": 4, "cap_feat_dim": 12}

CASES = {
    "SD 1.5": unet((1, 1, 1, 1), (YES, YES, YES, NO), linear=False),
    "SD 2": unet((1, 1, 1, 1), (YES, YES, YES, NO)),
    "SD 2 unCLIP": unet(
        (1, 1, 1, 1),
        (YES, YES, YES, NO),
        LABEL,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=10,
    ),
    "SD upscaler": unet(
        (1, 1, 1, 1), (NO, YES, YES, YES), {"label_emb.weight": (5, 16)}, num_class_embeds=5
    ),
    "SDXL": unet(
        (1, 2, 10),
        (NO, YES, YES),
        LABEL,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=10,
    ),
    "SDXL refiner": unet(
        (4, 4, 4, 4),
        (NO, YES, YES, NO),
        LABEL,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=10,
    ),
    "one level": unet((1,), (YES,)),
    "Flux dev": transformer(
        "flux_transformer_checkpoint",
        models.flux(guidance=True),
        "FluxTransformer2DModel",
        guidance_embeds=True,
        pooled_projection_dim=10,
        **FLUX,
    ),
    "Flux schnell": transformer(
        "flux_transformer_checkpoint",
        models.flux(guidance=False),
        "FluxTransformer2DModel",
        pooled_projection_dim=10,
        **FLUX,
    ),
    "SD3": transformer(
        "sd3_transformer_checkpoint", models.sd3(dual=False), "SD3Transformer2DModel", **SD3
    ),
    "SD3.5": transformer(
        "sd3_transformer_checkpoint",
        models.sd3(dual=True),
        "SD3Transformer2DModel",
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **SD3,
    ),
    "Wan": transformer(
        "wan_transformer", models.wan(image=False, vace=False), "WanTransformer3DModel", **WAN
    ),
    "Wan image to video": transformer(
        "wan_transformer",
        models.wan(image=True, vace=False),
        "WanTransformer3DModel",
        **WAN,
        **IMAGE,
    ),
    "Wan VACE": transformer(
        "wan_transformer",
        models.wan(image=False, vace=True),
        "WanVACETransformer3DModel",
        vace_layers=[0, 1],
        vace_in_channels=12,
        **WAN,
    ),
    "Flux.2": transformer(
        "flux2_transformer_checkpoint", models.flux2(), "Flux2Transformer2DModel", **FLUX
    ),
    "Chroma": transformer(
        "chroma_transformer_checkpoint",
        models.chroma(),
        "ChromaTransformer2DModel",
        approximator_num_channels=64,
        approximator_hidden_dim=models.WIDTH,
        approximator_layers=2,
        **FLUX,
    ),
    "HunyuanVideo": transformer(
        "hunyuan_video_transformer",
        models.hunyuan_video(),
        "HunyuanVideoTransformer3DModel",
        out_channels=4,
        text_embed_dim=12,
        pooled_projection_dim=10,
        **(HEADS | {"in_channels": 4, "num_layers": 2, "num_single_layers": 2}),
    ),
    "Z-Image": transformer(
        "z_image_transformer_checkpoint",
        models.z_image(),
        "ZImageTransformer2DModel",
        unused=("norm_final.weight",),
        dim=models.WIDTH,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        siglip_feat_dim=12,
        axes_dims=[2, 2, 4],
        **NEXT_DIT,
    ),
    "Lumina 2": transformer(
        "lumina2",
        models.lumina2(),
        "Lumina2Transformer2DModel",
        unused=("norm_final.weight",),
        hidden_size=models.WIDTH,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=1,
        axes_dim_rope=(2, 2, 4),
        **NEXT_DIT,
    ),
}


def diffusers(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"diffusers{module}"), name)


def narrowed(code: CodeType, widths: Mapping[int, int]) -> CodeType:
    """The same code with other numbers: converters hold the widths of the published models."""
    consts = [
        narrowed(const, widths)
        if isinstance(const, CodeType)
        else widths.get(const, const)
        if type(const) is int
        else const
        for const in code.co_consts
    ]
    return code.replace(co_consts=tuple(consts))


def filled(shapes: Shapes) -> Tensors:
    """No number is there twice, in all of them together."""
    out, start = {}, 0
    for name, shape in shapes.items():
        stop = start + torch.Size(shape).numel()
        out[name] = torch.arange(start, stop, dtype=torch.int32).reshape(shape)
        start = stop
    return out


def converted(case: Case, tensors: Tensors) -> Tensors:
    whole = diffusers(".loaders.single_file_utils", case.converter)
    convert = FunctionType(narrowed(whole.__code__, case.widths), whole.__globals__)
    convert.__kwdefaults__, convert.__defaults__ = whole.__kwdefaults__, whole.__defaults__
    prefix = "model.diffusion_model." if case.options else ""
    return dict(convert({prefix + k: v for k, v in tensors.items()}, **case.options))


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def made(origin: Origin, tensors: Tensors) -> torch.Tensor:
    assert isinstance(origin, tuple), origin
    return torch.cat([tensors[rows.tensor][rows.start : rows.stop] for rows in origin])


def differences(stored: Tensors, other: Tensors) -> list[str]:
    """Names in which what is made of stored tensors is not what it is, or is not there."""
    found = other_names(shapes_of(stored))
    names = found.keys() | other.keys() - stored.keys()
    return sorted(
        name
        for name in names
        if name not in found
        or name not in other
        or not torch.equal(made(found[name], stored), other[name])
    )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_the_small_models_are_those_of_diffusers(case: Case) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Chroma's, on itself
        model = diffusers("", case.model)(**case.config)
    assert shapes_of(converted(case, filled(case.original))) == shapes_of(model.state_dict())


def test_a_base_in_its_authors_names(case: Case) -> None:
    original = filled(case.original)
    other = converted(case, original)
    # Which of two embedders a label is for, is known from a config alone.
    labels = {name: tensor for name, tensor in other.items() if re.match(LABELLED, name)}
    for embedder in ("add_embedding.", "class_embedding."):
        other |= {re.sub(LABELLED, embedder, name): tensor for name, tensor in labels.items()}
    assert differences(original, other) == []


def test_a_base_of_diffusers(case: Case) -> None:
    original = filled(case.original)
    other = {name: tensor for name, tensor in original.items() if name not in case.unused}
    assert differences(converted(case, original), other) == []


def test_names_in_both_mean_the_same(case: Case) -> None:
    original = filled(case.original)
    other = converted(case, original)
    assert all(torch.equal(original[name], other[name]) for name in original.keys() & other.keys())


def test_open_clip() -> None:
    original = filled(models.open_clip())
    convert = diffusers(".loaders.single_file_utils", "convert_open_clip_checkpoint")
    other = convert(None, dict(original), prefix="")
    projections = ("text_projection.weight", "text_projection")
    for stored, name in zip((original, other), projections, strict=True):
        origin = other_names(shapes_of(stored)).get(name)
        assert isinstance(origin, Unsupported)
        assert "swapping axes" in origin.reason
    bare, ours = (
        {name: tensor for name, tensor in tensors.items() if name not in projections}
        for tensors in (original, other)
    )
    assert differences(bare, ours) == []
    assert differences(ours, bare) == []
    short = {name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
    assert differences(short, bare) == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("input_blocks.4.1.transformer_blocks.1.attn2.to_k", "down_blocks.1.attentions.0"),
        ("input_blocks.8.0.in_layers.2", "down_blocks.2.resnets.1.conv1"),
        ("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.6.0.skip_connection", "up_blocks.2.resnets.0.conv_shortcut"),
    ],
)
def test_places_in_sdxl(theirs: str, ours: str) -> None:
    found = other_names(CASES["SDXL"].original)
    (name,) = (k for k, v in found.items() if v == whole(theirs, CASES["SDXL"].original))
    assert name.startswith(ours)


def whole(module: str, shapes: Shapes) -> tuple[Rows, ...]:
    return (Rows(f"{module}.weight", 0, shapes[f"{module}.weight"][0]),)


def test_fused_rows() -> None:
    """By hand, in case that test and code err in the same way."""
    width = models.WIDTH
    base = models.flux(guidance=False)
    found = other_names(base)
    fused = "single_blocks.1.linear1.weight"
    single = "single_transformer_blocks.1"
    assert found[f"{single}.attn.to_v.weight"] == (Rows(fused, 2 * width, 3 * width),)
    assert found[f"{single}.proj_mlp.weight"] == (Rows(fused, 3 * width, 7 * width),)
    norm = "final_layer.adaLN_modulation.1.bias"
    swapped = (Rows(norm, width, 2 * width), Rows(norm, 0, width))
    assert found["norm_out.linear.bias"] == swapped


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"),
        ("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.img_mod.1.weight"),
        ("double_blocks.0.img_attn.qkv.weight",),
    ],
)
def test_unknown(names: tuple[str, ...]) -> None:
    assert other_names(dict.fromkeys(names, (4, 4))) == {}


MALFORMED: tuple[tuple[int, ...], ...] = ((), (0,), (7,), (7, 0), (7, 5, 1))


def test_malformed_shapes_do_not_crash(case: Case) -> None:
    for stored in (case.original, dict(other_shapes(case.original))):
        names = other_names(stored).keys()
        for shape in MALFORMED:
            assert other_names(dict.fromkeys(stored, shape)).keys() <= names


def other_shapes(stored: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same model in its other names."""
    found = other_names(stored)
    for name, origin in found.items():
        assert isinstance(origin, tuple)
        rows = sum(part.stop - part.start for part in origin)
        yield name, (rows, *stored[origin[0].tensor][1:])
    taken = {part.tensor for origin in found.values() for part in origin}
    yield from ((name, shape) for name, shape in stored.items() if name not in taken)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("double_blocks.0.img_attn.qkv.weight", (3 * models.WIDTH + 1, models.WIDTH)),
        ("single_blocks.0.linear1.weight", (3 * models.WIDTH, models.WIDTH)),
        ("single_blocks.0.linear1.weight", (7 * models.WIDTH,)),
        ("final_layer.adaLN_modulation.1.weight", (2 * models.WIDTH + 1, models.WIDTH)),
    ],
)
def test_rows_that_do_not_divide_are_left_out(name: str, shape: tuple[int, ...]) -> None:
    base = models.flux(guidance=False)
    found = other_names(base | {name: shape})
    assert not any(part.tensor == name for origin in found.values() for part in origin)
    gone = other_names(base).keys() - found.keys()
    assert gone
    assert all(part.tensor.startswith(name[:-6]) for k in gone for part in other_names(base)[k])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer_blocks.0.attn.to_k.weight", (models.WIDTH, 3)),
        ("transformer_blocks.0.attn.to_k.weight", (3, models.WIDTH)),
        ("transformer_blocks.0.attn.to_k.weight", None),
    ],
)
def test_parts_that_do_not_fit_are_not_joined(name: str, shape: tuple[int, ...] | None) -> None:
    base = dict(other_shapes(models.flux(guidance=False)))
    fused = "double_blocks.0.img_attn.qkv.weight"
    assert fused in other_names(base)
    bad = base | {name: shape} if shape else {k: v for k, v in base.items() if k != name}
    assert other_names(base).keys() - other_names(bad).keys() == {fused}
