"""What the files of image adapters say, by their names and shapes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_convert.core.adapter import Adapter, LayerKind, MagnitudeAxis
from dora_convert.core.bundle import Bundle
from dora_convert.core.deltas import Hadamard, Kronecker, LowRank, Tucker
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError
from dora_convert.formats import detect, formats

from ..core.values import bundle, ref
from .test_detect import ADAPTERS, adapter

IN, OUT = MagnitudeAxis.IN, MagnitudeAxis.OUT
Shapes = dict[str, tuple[int, ...]]


def read(shapes: Shapes, **more: object) -> Adapter:
    held = replace(bundle(shapes, None), **more)  # type: ignore[arg-type]
    return formats.get(detect(held)).read(held)


def problems(shapes: Shapes, **more: object) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        read(shapes, **more)
    return tuple(caught.value.problems)


def lora(path: str, out: int = 6, inner: int = 4, *kernel: int, rank: int = 2) -> Shapes:
    ones = (1,) * len(kernel)
    return {
        f"{path}.lora_down.weight": (rank, inner, *kernel),
        f"{path}.lora_up.weight": (out, rank, *ones),
    }


@pytest.mark.parametrize(
    ("shape", "magnitude", "axis"),
    [
        ((6, 4), (6, 1), OUT),
        ((6, 4), (1, 4), IN),
        ((4, 4), (4, 1), OUT),
        ((4, 4), (1, 4), IN),
        ((4, 4), (4,), OUT),  # renamed from PEFT's
        ((6, 4, 3, 3), (6, 1, 1, 1), OUT),
        ((6, 4, 3, 3), (1, 4, 1, 1), IN),
        ((6, 4, 3, 3), (1, 6, 1, 1), OUT),  # PEFT's, renamed
        ((4, 4, 1, 1), (1, 4, 1, 1), IN),  # either, and LyCORIS writes such files
    ],
)
def test_axis(shape: tuple[int, ...], magnitude: tuple[int, ...], axis: MagnitudeAxis) -> None:
    found = read(lora("lora_unet_a", *shape) | {"lora_unet_a.dora_scale": magnitude})
    module = found.modules["lora_unet_a"]
    assert module.axis is axis
    assert module.magnitude is not None
    assert module.magnitude.spec.shape == (max(magnitude),)
    assert module.kind is (LayerKind.CONVOLUTION if len(shape) > 2 else LayerKind.LINEAR)
    assert found.is_place_open
    assert not found.is_axis_open


def test_a_square_convolution_goes_by_the_others() -> None:
    shapes = lora("lora_unet_a", 4, 4, 3, 3) | {"lora_unet_a.dora_scale": (1, 4, 1, 1)}
    shapes |= lora("lora_unet_b", 6, 4) | {"lora_unet_b.dora_scale": (6, 1)}
    assert read(shapes).modules["lora_unet_a"].axis is OUT


def test_the_users_word_on_the_axis() -> None:
    shapes = lora("lora_unet_a", 4, 4, 3, 3) | {"lora_unet_a.dora_scale": (1, 4, 1, 1)}
    found = formats.get("kohya").read(bundle(shapes, None), axis=OUT)
    assert found.modules["lora_unet_a"].axis is OUT


def test_axes_that_contradict_each_other() -> None:
    shapes = lora("lora_unet_a") | {"lora_unet_a.dora_scale": (1, 4)}
    shapes |= lora("lora_unet_b") | {"lora_unet_b.dora_scale": (6, 1)}
    (problem,) = problems(shapes)
    assert "lora_unet_a is one per input" in problem
    assert "--axis" in problem


def test_a_magnitude_of_another_length() -> None:
    (problem,) = problems(lora("lora_unet_a") | {"lora_unet_a.dora_scale": (5, 1)})
    assert problem == "lora_unet_a: the magnitude has 5 entries, expected 6"


def test_scale() -> None:
    shapes = lora("lora_unet_a", rank=4) | lora("lora_unet_b") | {"lora_unet_a.alpha": ()}
    found = read(shapes, scalars={"lora_unet_a.alpha": 2.0})
    assert found.modules["lora_unet_a"].scaling == 0.5
    # What has no alpha is taken as every loader takes it.
    assert found.modules["lora_unet_b"].scaling == 1
    assert any("plain LoRA" in note for note in found.notes)
    assert problems(shapes) == ("lora_unet_a.alpha is not one finite number",)


@pytest.mark.parametrize(
    ("parts", "kind", "rank", "divisor"),
    [
        ({"lora_mid.weight": (3, 2, 3, 3), "lora_down.weight": (2, 4, 1, 1),
          "lora_up.weight": (6, 3, 1, 1)}, Tucker, 3, 2),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 36), "hada_w2_a": (6, 3), "hada_w2_b": (3, 36)},
         Hadamard, 6, 2),
        ({"hada_w1_a": (2, 6), "hada_w1_b": (3, 4), "hada_t1": (2, 3, 3, 3),
          "hada_w2_a": (2, 6), "hada_w2_b": (3, 4), "hada_t2": (2, 3, 3, 3)}, Hadamard, 4, 3),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 4), "lokr_w2_b": (4, 18)}, Kronecker, 8, 4),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2": (3, 2, 3, 3)}, Kronecker, 3, 1),
        ({"lokr_w1": (2, 2), "lokr_w2": (3, 2, 3, 3)}, Kronecker, 6, None),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (4, 2),
          "lokr_t2": (4, 4, 3, 3)}, Kronecker, 8, 4),
    ],
)  # fmt: skip
def test_other_forms(parts: Shapes, kind: type, rank: int, divisor: int | None) -> None:
    shapes = {f"lora_unet_a.{part}": shape for part, shape in parts.items()}
    shapes |= {"lora_unet_a.alpha": (), "lora_unet_a.dora_scale": (1, 4, 1, 1)}
    module = read(shapes, scalars={"lora_unet_a.alpha": 1.0}).modules["lora_unet_a"]
    assert isinstance(module.delta, kind)
    assert module.delta.shape == (6, 36)
    assert module.delta.rank == rank
    assert len(module.delta.tensors) == len(parts)
    assert module.scaling == (1 if divisor is None else 1 / divisor)
    assert module.axis is IN


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"lora_down.weight": (2, 4)}, "up is missing"),
        ({"dora_scale": (6, 1)}, "a magnitude or an alpha, and no factors"),
        ({"lora_up.weight": (6, 2), "lora_down.weight": (2, 4), "lokr_w1": (2, 2)}, "of several"),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2)}, "hada_w2_b is missing"),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)},
         "the two products are [6, 4] and [6, 5]"),
        ({"hada_w1_a": (2, 6), "hada_w1_b": (2, 4), "hada_t1": (9, 2, 3, 3),
          "hada_w2_a": (2, 6), "hada_w2_b": (2, 4), "hada_t2": (2, 2, 3, 3)}, "do not go together"),
        ({"hada_w1_a": (2,), "hada_w1_b": (2, 4), "hada_t1": (2, 2, 3, 3),
          "hada_w2_a": (2, 6), "hada_w2_b": (2, 4), "hada_t2": (2, 2, 3, 3)}, "do not go together"),
        ({"lora_up.weight": (6, 2), "lora_down.weight": (2, 4), "lora_mid.weight": (2, 2)},
         "do not go together"),
        ({"lokr_w1_a": (2, 3), "lokr_w1_b": (2, 2), "lokr_w2": (3, 2)}, "the ranks disagree"),
        ({"lokr_w1": (2, 2)}, "lokr_w2_a is missing"),
        ({"lora_up.weight": (6, 2), "lora_down.weight": (3, 4)}, "the ranks disagree"),
        ({"lora_up.weight": (0, 2), "lora_down.weight": (2, 4)}, "is empty"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(parts: Shapes, told: str) -> None:
    shapes = {f"lora_unet_a.{part}": shape for part, shape in parts.items()}
    found = problems(shapes | lora("lora_unet_b"))
    assert any(problem.startswith("lora_unet_a") and told in problem for problem in found), found


def test_dots_and_underscores_are_one() -> None:
    """As diffusers' `convert_state_dict_to_kohya` leaves them (ComfyUI issue 3494)."""
    shapes = lora("lora_unet_mid_block_attn1_to_q")
    shapes["lora_unet_mid_block_attn1.to_q.lora_magnitude_vector"] = (6,)
    (module,) = read(shapes).modules.values()
    assert module.path == "lora_unet_mid_block_attn1_to_q"
    assert module.magnitude is not None


def test_a_part_that_is_there_twice() -> None:
    shapes = lora("lora_unet_a_b") | {"lora_unet_a.b.lora_up.weight": (6, 2)}
    (problem,) = problems(shapes)
    assert "are the same part of one module" in problem
    shapes = lora("lora_unet_a") | {"lora_unet_a.lora_B.weight": (6, 2)}
    (problem,) = problems(shapes)
    assert "are the same part of one module" in problem


def test_what_is_no_part_of_a_module() -> None:
    shapes = lora("lora_unet_a") | {"bundle_emb.x.clip_l": (3, 8), "lora_unet_a.diff_b": (6,)}
    found = problems(shapes)
    assert found == (
        "bundle_emb.x.clip_l [3, 8] is not understood",
        "lora_unet_a.diff_b [6] is not understood",
    )


def test_integers_are_no_factors() -> None:
    held = {name: ref(name, *shape, dtype=DType.I8) for name, shape in lora("lora_unet_a").items()}
    with pytest.raises(InputError) as caught:
        formats.get("kohya").read(bundle(held, None))
    assert all("not a float" in problem for problem in caught.value.problems)


SCALED = lora("lora_unet_a") | {"lora_unet_a.dora_scale": (6, 1)}
LYCORIS = {"ss_network_module": "lycoris.kohya"}


@pytest.mark.parametrize(
    ("metadata", "noted"),
    [
        ({"ss_training_started_at": "1735689600.5"}, True),  # January 2025
        ({"ss_training_started_at": "1735689600.5", "ss_network_args": '{"bypass_mode": "False"}'},
         False),
        ({"ss_training_started_at": "1704067200"}, False),  # January 2024
        ({"ss_training_started_at": "soon", "ss_network_args": "[1]"}, False),
        ({"ss_network_args": "{"}, False),
    ],
)  # fmt: skip
def test_magnitudes_that_lycoris_did_not_use(metadata: dict[str, str], noted: bool) -> None:
    found = read(SCALED, metadata=LYCORIS | metadata)
    assert any("--ignore '*.dora_scale'" in note for note in found.notes) is noted
    assert read(SCALED, metadata=metadata).notes == ()


def test_bypass_mode_is_refused() -> None:
    arguments = json.dumps({"bypass_mode": "True"})
    (problem,) = problems(SCALED, metadata=LYCORIS | {"ss_network_args": arguments})
    assert "bypass_mode" in problem


# diffusers


def peft(path: str, out: int = 6, inner: int = 4, rank: int = 2) -> Shapes:
    return {
        f"{path}.lora_A.weight": (rank, inner),
        f"{path}.lora_B.weight": (out, rank),
        f"{path}.lora_magnitude_vector": (out,),
    }


Q = "unet.mid.to_q"
BOTH = peft(Q) | peft("unet.mid.to_k", rank=4) | peft("text_encoder.q_proj")
CONFIG = {
    "unet.r": 2,
    "unet.lora_alpha": 8,
    "unet.rank_pattern": {"mid.to_k": 4},
    "unet.use_dora": True,
}


def header(config: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(config)}


def test_scale_of_every_component() -> None:
    found = read(BOTH, metadata=header(CONFIG))
    scales = {path: module.scaling for path, module in found.modules.items()}
    assert scales == {"unet.mid.to_q": 4, "unet.mid.to_k": 2, "text_encoder.q_proj": 1}
    assert found.notes == ()


def test_a_magnitude_that_is_missing() -> None:
    shapes = {name: shape for name, shape in BOTH.items() if name != f"{Q}.lora_magnitude_vector"}
    assert problems(shapes) == (f"{Q}: lora_magnitude_vector is missing",)
    found = read(lora("lora_unet_a") | SCALED | lora("lora_unet_b"))
    assert found.notes == ("1 of 2 modules hold no magnitude: plain LoRA",)


def test_no_scale_at_all() -> None:
    found = read(BOTH)
    assert {module.scaling for module in found.modules.values()} == {1}
    assert "--scale" in found.notes[0]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ([1], "is not a JSON object"),
        (CONFIG | {"unet.r": 3}, "says rank 3 (r), the tensors have rank 2"),
        (CONFIG | {"unet.init_lora_weights": "pissa"}, "init_lora_weights"),
        (CONFIG | {"unet.lora_alpha": "many"}, "lora_alpha"),
    ],
)
def test_a_header_that_is_wrong(config: object, told: str) -> None:
    assert any(told in problem for problem in problems(BOTH, metadata=header(config)))


def test_a_header_that_is_no_json() -> None:
    (problem,) = problems(BOTH, metadata={"lora_adapter_metadata": "{"})
    assert "is not a JSON object" in problem


# ai-toolkit


def test_ai_toolkit_has_no_scale() -> None:
    found = formats.get("ai_toolkit").read(adapter("ai-toolkit"))
    ((path, module),) = found.modules.items()
    assert (module.scaling, module.axis) == (1, OUT)
    assert path == "transformer.transformer_blocks.0.attn.to_q"


def test_ai_toolkit_on_a_unet_is_refused() -> None:
    shapes: Shapes = {
        "lora_unet_a.lora_A.weight": (2, 4),
        "lora_unet_a.lora_B.weight": (4, 2),
        "lora_unet_a.magnitude": (4,),
    }
    (problem,) = problems(shapes)
    assert "takes the norm of another update" in problem


# Other layouts


PLACED = [name for name in ADAPTERS if name.startswith("lycoris/lo")]


@pytest.mark.parametrize("name", PLACED)
def test_no_update_is_lost_in_another_layout(name: str) -> None:
    """With their places known, only updates of two matrices fit elsewhere."""
    found = replace(formats.get("kohya").read(adapter(name)), is_place_open=False)
    is_plain = all(isinstance(m.delta, LowRank) for m in found.modules.values())
    is_out = all(m.axis is OUT for m in found.modules.values())
    for target in formats.names():
        if target == "peft" and is_plain and is_out:
            made = formats.get(target).write(found)
            assert len(made.tensors) == 3 * len(found.modules)
            continue
        with pytest.raises(InputError) as caught:
            formats.get(target).write(found)
        assert caught.value.problems


def test_models_of_a_pipeline_are_no_adapter_of_one() -> None:
    held = formats.get("diffusers").read(adapter("diffusers/flux_meta"))
    modules = {f"transformer::{path}": module for path, module in held.modules.items()}
    with pytest.raises(InputError) as caught:
        formats.get("peft").write(replace(held, modules=modules, is_place_open=False))
    assert any("models of a pipeline" in problem for problem in caught.value.problems)


def test_a_config_beside_makes_it_pefts() -> None:
    shapes = peft("base_model.model.unet.a")
    held = bundle(shapes, {"peft_type": "LORA"})
    assert detect(held) == "peft"
    assert isinstance(held, Bundle)


NAMES = st.sampled_from(
    [
        *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale"),
        *("lora_A.weight", "lora_B.weight", "magnitude", "lora_magnitude_vector"),
        *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    ]
)
SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)


@settings(max_examples=400)
@given(
    st.sampled_from(["kohya", "diffusers", "ai_toolkit"]),
    st.dictionaries(st.tuples(st.sampled_from(["unet.a", "lora_unet_b"]), NAMES), SHAPES),
    st.sampled_from([None, IN, OUT]),
)
def test_any_shapes_are_understood_or_refused(
    name: str, parts: dict[tuple[str, str], tuple[int, ...]], axis: MagnitudeAxis | None
) -> None:
    held = bundle({f"{path}.{part}": shape for (path, part), shape in parts.items()}, None)
    try:
        found = formats.get(name).read(replace(held, scalars={"unet.a.alpha": 2.0}), axis=axis)
    except InputError:
        return
    for module in found.modules.values():
        assert module.delta is not None
        out, inner = module.delta.shape
        assert out > 0
        assert inner > 0
        assert module.delta.rank > 0
        if module.magnitude is not None:
            length = module.magnitude.spec.numel
            assert length == out if module.axis is OUT else inner % length == 0
