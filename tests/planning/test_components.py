"""Which module of which model of a base an image adapter's name means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dora_convert.core.adapter import Adapter, LayerKind
from dora_convert.core.bundle import Checkpoint
from dora_convert.errors import MismatchError
from dora_convert.planning.components import placed
from dora_convert.planning.planner import plan_merge

from ..core.values import adapter, checkpoint, dora, magnitude_only

Q = "down_blocks.0.attentions.0.to_q"
PIPELINE = {
    f"unet::{Q}.weight": (6, 4),
    "unet::conv_in.weight": (6, 4, 1, 1),
    "text_encoder::text_model.encoder.layers.0.mlp.fc1.weight": (6, 4),
    "text_encoder_2::text_model.encoder.layers.0.mlp.fc1.weight": (6, 4),
    "text_encoder_2::text_model.encoder.layers.1.mlp.fc1.weight": (6, 4),
    "vae::encoder.conv_in.weight": (6, 4),
}
FC = "text_model.encoder.layers.{}.mlp.fc1"


def found(base: Checkpoint, *paths: str) -> list[str]:
    return list(place(base, *paths).modules)


def place(base: Checkpoint, *paths: str) -> Adapter:
    modules = (dora(path, 6, 4) for path in paths)
    return placed(replace(adapter(*modules), is_place_open=True), base)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("lora_unet_down_blocks_0_attentions_0_to_q", f"unet::{Q}"),
        ("lycoris_down_blocks_0_attentions_0_to_q", f"unet::{Q}"),
        ("lora_unet__down_blocks_0_attentions_0_to_q", f"unet::{Q}"),
        (f"unet.{Q}", f"unet::{Q}"),
        (f"diffusion_model.{Q}", f"unet::{Q}"),
        (f"model.diffusion_model.{Q}", f"unet::{Q}"),
        (f"base_model.model.{Q}", f"unet::{Q}"),
        (Q, f"unet::{Q}"),
        # Both encoders have the first layer: its number decides.
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", f"text_encoder::{FC.format(0)}"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", f"text_encoder::{FC.format(0)}"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", f"text_encoder_2::{FC.format(0)}"),
        (f"text_encoder_2.{FC.format(1)}", f"text_encoder_2::{FC.format(1)}"),
        ("text_encoder.encoder.layers.0.mlp.fc1", f"text_encoder::{FC.format(0)}"),
        # Only the second has two layers, whatever it is called.
        ("lora_te3_text_model_encoder_layers_1_mlp_fc1", f"text_encoder_2::{FC.format(1)}"),
    ],
)
def test_names(path: str, expected: str) -> None:
    base = checkpoint(PIPELINE)
    assert found(base, path) == [expected]
    ((name, module),) = place(base, path).modules.items()
    assert module.path == name


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("model.diffusion_model.", "cond_stage_model.transformer."),
        ("model.diffusion_model.", "conditioner.embedders.0.transformer."),
        ("model.diffusion_model.", "text_encoders.clip_l.transformer."),
    ],
)
def test_one_file(prefix: str, text: str) -> None:
    names = (f"{prefix}{Q}", f"{text}{FC.format(0)}", "first_stage_model.a", "alphas")
    base = checkpoint({f"{name}.weight": (6, 4) for name in names})
    paths = ("lora_unet_down_blocks_0_attentions_0_to_q", "lora_te1_" + FC.format(0))
    assert found(base, *(path.replace(".", "_") for path in paths)) == list(names[:2])


def test_one_model() -> None:
    base = checkpoint({f"{Q}.weight": (6, 4)})
    assert found(base, f"unet.{Q}") == [Q]
    text = checkpoint({f"{FC.format(0)}.weight": (6, 4)})
    assert found(text, f"text_encoder.{FC.format(0)}") == [FC.format(0)]


def test_a_convolution_is_what_the_base_has_of_it() -> None:
    modules = place(checkpoint(PIPELINE), "lora_unet_conv_in", f"unet.{Q}").modules
    assert [module.kind for module in modules.values()] == [
        LayerKind.CONVOLUTION,
        LayerKind.LINEAR,
    ]


def told(base: Checkpoint, *paths: str) -> MismatchError:
    with pytest.raises(MismatchError) as caught:
        place(base, *paths)
    return caught.value


def test_models_that_are_not_there() -> None:
    base = checkpoint({f"{Q}.weight": (6, 4)})
    error = told(base, f"unet.{Q}", "lora_te1_a", "lora_te1_b")
    assert error.problems == (
        "lora_te1_: 2 modules of a text encoder, none of which is in the base",
    )
    assert "--exclude 'lora_te1_*'" in error.hint


def test_modules_that_are_not_there() -> None:
    error = told(checkpoint(PIPELINE), f"unet.{Q}", "unet.x.y", "lora_unet_z")
    assert error.problems == (
        "unet.x.y: the base has no module of that name",
        "lora_unet_: 1 module of a denoiser, none of which is in the base",
    )


def test_two_names_of_one_module() -> None:
    error = told(checkpoint(PIPELINE), f"unet.{Q}", f"unet.{Q.replace('.', '_')}")
    assert "are both unet::" in error.problems[0]


def test_underscores_that_may_mean_two_modules() -> None:
    base = checkpoint({"a.b_c.weight": (6, 4), "a.b.c.weight": (6, 4), "x.weight": (6, 4)})
    error = told(base, "lora_unet_a_b_c", "lora_unet_x")
    assert error.problems == ("lora_unet_a_b_c: the base has no module of that name",)
    assert found(base, "unet.a.b_c") == ["a.b_c"]


def test_what_is_no_image_adapter_stays() -> None:
    one = adapter(dora("x", 6, 4))
    assert placed(one, checkpoint(PIPELINE)) is one


def test_magnitudes_alone() -> None:
    one = replace(adapter(magnitude_only(f"unet.{Q}", 6)), is_place_open=True)
    assert list(placed(one, checkpoint(PIPELINE)).modules) == [f"unet::{Q}"]


def test_a_plan_of_a_pipeline() -> None:
    places = {name: f"{name.partition(':')[0]}/model.safetensors" for name in PIPELINE}
    base = checkpoint(PIPELINE, shards=places, files=())
    plan = plan_merge(place(base, f"unet.{Q}"), base).plan
    assert {shard.file for shard in plan.shards} == set(places.values())
    assert not plan.documents
