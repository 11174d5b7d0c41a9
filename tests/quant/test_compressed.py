"""The schemes of compressed-tensors against the library's own compressors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError
from dora_convert.quant import detect
from tests.quant.engine import find, normal, read_one, same_bytes, scheme, spec_of, write, write_as

PRESETS = {
    "fp8_dynamic": ("FP8_DYNAMIC", "float-quantized"),
    "w8a8": ("W8A8", "int-quantized"),
    "w4a16": ("W4A16", "pack-quantized"),
    "w8a16": ("W8A16", "pack-quantized"),
}
FLOATS = {"nvfp4a16": "nvfp4-pack-quantized", "mxfp4a16": "mxfp4-pack-quantized"}


def official(preset: str, layout: str, weight: Tensor) -> tuple[dict[str, Tensor], Any, Any]:
    """The library's own tensors for a weight, without calibration."""
    plan = preset_name_to_scheme(preset, ["Linear"])
    args = plan.weights
    width = args.group_size or weight.shape[1]
    grouped = weight.view(weight.shape[0], -1, width)
    scale, zero = calculate_qparams(grouped.amin(dim=2), grouped.amax(dim=2), args)
    compressor = BaseCompressor.get_value_from_registry(layout)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored = compressor.compress(state, plan)
    if args.symmetric:
        stored.pop("weight_zero_point", None)
    return {f"a.{k}": v for k, v in stored.items()}, compressor, plan


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_and_values_are_the_librarys(name: str, dtype: torch.dtype) -> None:
    weight = normal(96, 512, dtype=dtype)
    weight[3] = 0
    expected, compressor, plan = official(*PRESETS[name], weight)
    stored = write(scheme(name), weight, step=32)
    assert stored.keys() == expected.keys()
    assert all(same_bytes(stored[n], expected[n]) for n in stored)

    local = {n.removeprefix("a."): t for n, t in expected.items()}
    dense = read_one(scheme(name), scheme(name).config([]), stored, step=17)
    assert same_bytes(dense.to(dtype), compressor.decompress(local, plan)["weight"].to(dtype))


def official_fp4(
    name: str, weight: Tensor, *partners: Tensor
) -> tuple[dict[str, Tensor], Any, Any]:
    """The library's own tensors; `partners` share the scale of the tensor, if there is one."""
    plan = preset_name_to_scheme(name.upper(), ["Linear"])
    state = {"weight": weight}
    if name == "nvfp4a16":
        fused = torch.cat([weight, *partners])
        state["weight_global_scale"] = generate_gparam(fused.amin(), fused.amax())
    grouped = weight.view(len(weight), -1, plan.weights.group_size)
    state["weight_scale"], _ = calculate_qparams(
        grouped.amin(dim=2), grouped.amax(dim=2), plan.weights, state.get("weight_global_scale")
    )
    compressor = BaseCompressor.get_value_from_registry(FLOATS[name])
    stored = compressor.compress(state, plan)
    return {f"a.{k}": v for k, v in stored.items()}, compressor, plan


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_four_bit_floats(name: str, dtype: torch.dtype) -> None:
    weight = normal(96, 512, dtype=dtype)
    weight[3] = 0
    partner = normal(32, 512, dtype=dtype) * 3
    # Codes for what is larger than 6 and for ties are part of it.
    weight[5, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    expected, compressor, plan = official_fp4(name, weight, partner)
    declared = scheme(name).layout(spec_of("a.weight", weight))
    stored = write_as(scheme(name), declared, weight, step=32, partners=(partner,))
    assert stored.keys() == expected.keys()
    assert all(same_bytes(stored[n], expected[n]) for n in stored)

    local = {n.removeprefix("a."): t for n, t in expected.items()}
    dense = read_one(scheme(name), scheme(name).config([]), stored, step=17)
    assert same_bytes(dense.bfloat16(), compressor.decompress(local, plan)["weight"].bfloat16())


def test_fused_layers_share_the_scale_of_the_tensor() -> None:
    fused = scheme("nvfp4a16").fused
    block = "model.layers.0.self_attn"
    assert fused(f"{block}.q_proj.weight") == fused(f"{block}.v_proj.weight") == f"{block}.qkv"
    assert fused("m.mlp.gate_proj.weight") == fused("m.mlp.up_proj.weight") == "m.mlp.gate_up"
    assert fused(f"{block}.o_proj.weight") is None
    assert fused("n.mlp.up_proj.weight") != fused("m.mlp.up_proj.weight")


def test_zero_points_are_read() -> None:
    weight = normal(96, 512) + 0.01
    stored, compressor, plan = official("W4A16_ASYM", "pack-quantized", weight)
    assert stored["a.weight_zero_point"].shape == (12, 4)
    local = {n.removeprefix("a."): t for n, t in stored.items()}
    dense = read_one(scheme("w4a16"), scheme("w4a16").config([]), stored, step=5)
    assert same_bytes(dense.bfloat16(), compressor.decompress(local, plan)["weight"])


def test_zero_points_of_plain_codes_are_read() -> None:
    weight = normal(96, 512) + 0.01
    plan = preset_name_to_scheme("W8A8", ["Linear"])
    plan.weights.symmetric = False
    scale, zero = calculate_qparams(
        weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True), plan.weights
    )
    assert zero.any()
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    local = compressor.compress(state, plan)
    stored = {f"a.{n}": t for n, t in local.items()}
    dense = read_one(scheme("w8a8"), scheme("w8a8").config([]), stored, step=5)
    assert same_bytes(dense.bfloat16(), compressor.decompress(dict(local), plan)["weight"])


@pytest.mark.parametrize("block", [[0, 128], ["a", 128], [64, 64]])
def test_tiles_that_make_no_sense_are_refused(block: list[object]) -> None:
    weights = {"strategy": "block", "block_structure": block, "type": "float", "num_bits": 8}
    words = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    words |= {"config_groups": {"group_0": {"weights": weights}}}  # type: ignore[dict-item]
    stored = {"a.weight": normal(256, 256).to(torch.float8_e4m3fn), "a.weight_scale": normal(2, 2)}
    with pytest.raises(InputError) as caught:
        find(scheme("fp8_dynamic"), {"quantization_config": words}, stored)
    assert "weight_scale BF16 [2, 2] does not fit" in caught.value.problems[0]


@pytest.mark.parametrize("preset", ["FP8", "FP8_BLOCK"])
def test_other_scales_are_read(preset: str) -> None:
    """One scale a tensor, and one a tile, by the definition `code * scale`."""
    codes = normal(256, 256).to(torch.float8_e4m3fn)
    grid = torch.tensor([0.5]) if preset == "FP8" else torch.tensor([[0.5, 2.0], [4.0, 8.0]])
    words = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        format="float-quantized",
    ).to_dict()
    stored = {"a.weight": codes, "a.weight_scale": grid.bfloat16()}
    config = json.loads(json.dumps({"quantization_config": words}, default=str))
    dense = read_one(scheme("fp8_dynamic"), config, stored, step=100)
    for row, column in ((0, 0), (127, 128), (128, 127), (255, 255)):
        scale = grid[0] if preset == "FP8" else grid[row // 128, column // 128]
        assert dense[row, column] == codes[row, column].float() * scale


@pytest.mark.parametrize("name", [*PRESETS, *FLOATS])
def test_config_is_that_of_the_library(name: str) -> None:
    preset, layout = PRESETS.get(name) or (name.upper(), FLOATS[name])
    words = scheme(name).config(["lm_head"])["quantization_config"]
    plan = preset_name_to_scheme(preset, ["Linear"])
    plan.format = layout
    # The type of zero points, of which there are none, is not part of a saved config.
    without = {"exclude": {"weights": {"zp_dtype"}}}
    ours = QuantizationConfig(**words).config_groups["group_0"]
    assert ours.model_dump(**without) == plan.model_dump(**without)
    assert QuantizationConfig(**words).ignore == ["lm_head"]
    assert detect({"quantization_config": words}) == (name,)


@pytest.mark.parametrize("name", PRESETS)
def test_float32_is_rounded_once(name: str) -> None:
    """No code is farther from the exact quotient than half a step, bfloat16 scale and all."""
    weight = normal(64, 256, dtype=torch.float32)
    declared = scheme(name).layout(TensorSpec("a.weight", DType.BF16, (64, 256)))
    parts = scheme(name).quantize(declared, weight)
    assert parts["scale"].dtype == torch.bfloat16
    if name == "fp8_dynamic":
        scale = parts["scale"].double()
        nearest = (weight.double() / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn)
        assert same_bytes(parts["weight"], nearest)
        return
    stored = {declared.parts[r].name: t for r, t in parts.items()}
    stored |= {declared.parts[r].name: t for r, t in scheme(name).constants(declared).items()}
    dense = read_one(scheme(name), scheme(name).config([]), stored).double()
    width = declared.settings["width"]
    scale = parts["scale"].double().repeat_interleave(width, dim=1)
    inside = weight.double() < scale * 127 if name != "w4a16" else weight.double() < scale * 7
    assert ((dense - weight.double()).abs() <= scale * 0.5 * (1 + 1e-6))[inside].all()


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of 128") as caught:
        write(scheme("w4a16"), normal(8, 200))
    assert caught.value.where == ("a.weight [out, in] = [8, 200]",)
    assert "--keep-dense" in caught.value.hint


def test_faults_come_all_at_once() -> None:
    stored = write(scheme("w4a16"), normal(16, 128))
    stored |= write(scheme("w4a16"), normal(16, 128), name="b.weight")
    del stored["a.weight_shape"]
    stored["b.weight_scale"] = torch.ones(16, 3)
    with pytest.raises(InputError) as caught:
        find(scheme("w4a16"), scheme("w4a16").config([]), stored)
    assert caught.value.problems == (
        "a.weight_shape is missing or holds no two numbers",
        "b.weight_scale F32 [16, 3] does not divide [16, 128]",
    )
    stored = write(scheme("w8a8"), normal(16, 128))
    del stored["a.weight_scale"]
    with pytest.raises(InputError, match="cannot be read") as caught:
        find(scheme("w8a8"), scheme("w8a8").config([]), stored)
    assert caught.value.problems == ("a.weight I8 [16, 128]: weight_scale is missing",)


def test_four_and_eight_bits_in_one_checkpoint() -> None:
    """Told apart by the tensors: each scheme finds its own."""
    stored = write(scheme("w4a16"), normal(16, 128))
    stored |= write(scheme("w8a16"), normal(16, 128), name="b.weight")
    assert find(scheme("w4a16"), {}, stored).keys() == {"a.weight"}
    assert find(scheme("w8a16"), {}, stored).keys() == {"b.weight"}
