"""Block FP8 against transformers' own conversion."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from dora_convert.errors import InputError
from tests.quant.engine import (
    find,
    normal,
    read,
    read_one,
    same_bytes,
    scheme,
    spec_of,
    write,
    write_as,
)

FP8 = scheme("fp8")


def official(block: list[int] | None = None) -> SimpleNamespace:
    config = FineGrainedFP8Config(weight_block_size=(128, 128) if block is None else block)
    return SimpleNamespace(quantization_config=config)


def _only(found: Any) -> Tensor:
    (value,) = found.values()
    return value[0] if isinstance(value, list) else value


@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
def test_bytes_are_those_of_transformers(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    weight[:128, :128] = 0
    expected = Fp8Quantize(official()).convert({"a.weight": weight})
    stored = write(FP8, weight)
    assert stored.keys() == expected.keys()
    assert all(same_bytes(stored[n], expected[n]) for n in stored)


def test_the_dense_weight_is_that_of_transformers() -> None:
    stored = write(FP8, normal(256, 384))
    dense = read_one(FP8, {**FP8.config([]), "dtype": "bfloat16"}, stored, step=100)
    expected = Fp8Dequantize(official()).convert(
        {"weight": [stored["a.weight"]], "weight_scale_inv": [stored["a.weight_scale_inv"]]}
    )
    assert same_bytes(dense.bfloat16(), _only(expected).bfloat16())


def test_cut_tiles_by_the_definition() -> None:
    """Each element times the scale of tile (row // 128, column // 128), as DeepSeek's kv_a_proj."""
    weight = normal(300, 200, dtype=torch.float32)
    stored = write(FP8, weight)
    codes, scale = stored["a.weight"].double(), stored["a.weight_scale_inv"].double()
    assert scale.shape == (3, 2)
    dense = read_one(FP8, FP8.config([]), stored, step=128)
    for row, column in ((0, 0), (127, 128), (128, 127), (299, 199)):
        exact = codes[row, column] * scale[row // 128, column // 128]
        assert dense[row, column] == exact.float()
        assert abs(exact - weight[row, column]) <= abs(weight[row, column]) / 16 + 1e-4


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_for_the_tensor(shape: tuple[int, ...]) -> None:
    codes = normal(64, 48).to(torch.float8_e4m3fn)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    stored = {"a.weight": codes, "a.weight_scale_inv": torch.full(shape, 0.37)}
    assert torch.equal(read_one(FP8, config, stored, step=9), codes.float() * 0.37)


def test_scales_that_are_powers_of_two() -> None:
    stored = write(FP8, normal(128, 256))
    exponents = torch.tensor([[120, 127]], dtype=torch.uint8)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        dense = read_one(FP8, FP8.config([]), stored | {"a.weight_scale_inv": scale})
        factor = torch.tensor([2.0**-7, 1.0]).repeat_interleave(128)
        assert torch.equal(dense, stored["a.weight"].float() * factor)


def test_config_is_what_transformers_reads() -> None:
    words = FP8.config(["lm_head"])["quantization_config"]
    read = FineGrainedFP8Config(**{k: v for k, v in words.items() if k != "quant_method"})
    assert read.modules_to_not_convert == ["lm_head"]
    assert {k: v for k, v in read.to_dict().items() if k in words} | {"fmt": "e4m3"} == words | {
        "weight_block_size": read.weight_block_size
    }
    assert list(read.weight_block_size or ()) == words["weight_block_size"]


def test_faults_come_all_at_once() -> None:
    stored = write(FP8, normal(128, 256)) | write(FP8, normal(128, 256), name="b.weight")
    del stored["a.weight_scale_inv"]
    stored["b.weight_scale_inv"] = torch.ones(2, 2)
    with pytest.raises(InputError) as caught:
        find(FP8, FP8.config([]), stored)
    assert caught.value.problems == (
        "a.weight: weight_scale_inv is missing",
        "b.weight: [128, 256] in tiles of 128 x 128 needs [1, 2] scales, the file has [2, 2]",
    )
    with pytest.raises(InputError) as caught:
        find(
            FP8, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}}, {}
        )
    assert "weight_block_size" in caught.value.problems[0]


EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def test_experts_in_one_tensor() -> None:
    """Bytes and values are those of transformers, for which a row is a matrix here."""
    weight = normal(3, 256, 384).mul_(torch.tensor([1.0, 3.0, 0.5]).view(3, 1, 1).bfloat16())
    expected = Fp8Quantize(official()).convert({EXPERTS: weight})
    declared = FP8.layout(spec_of(EXPERTS, weight))
    assert declared.dense.shape == (3, 256 * 384)
    stored = write_as(FP8, declared, weight.view(3, -1), step=2)
    assert stored.keys() == expected.keys()
    assert all(same_bytes(stored[n], expected[n]) for n in stored)
    config = {**FP8.config([]), "dtype": "bfloat16"}
    found = find(FP8, config, stored)[EXPERTS]
    assert found == declared
    dense = Fp8Dequantize(official()).convert(
        {"weight": [stored[EXPERTS]], "weight_scale_inv": [stored[f"{EXPERTS}_scale_inv"]]}
    )
    for step in (3, 1):
        got = read(FP8, found, stored, step=step).bfloat16()
        assert torch.equal(got, _only(dense).bfloat16().view(3, -1))


def test_cut_tiles_of_experts_by_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(2, 130, 200, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, 2, generator=generator)
    (weight,) = find(FP8, FP8.config([]), {EXPERTS: codes, f"{EXPERTS}_scale_inv": scale}).values()
    got = read(FP8, weight, {EXPERTS: codes, f"{EXPERTS}_scale_inv": scale}, step=1)
    rows, columns = torch.arange(130) // 128, torch.arange(200) // 128
    exact = codes.double() * scale.double()[:, rows][:, :, columns]
    assert torch.equal(got.view(2, 130, 200), exact.float())


def test_experts_with_scales_that_do_not_fit() -> None:
    stored = {EXPERTS: torch.zeros(2, 130, 200).to(torch.float8_e4m3fn),
              f"{EXPERTS}_scale_inv": torch.ones(2, 2, 1)}  # fmt: skip
    with pytest.raises(InputError) as caught:
        find(FP8, FP8.config([]), stored)
    assert "needs [2, 2, 2] scales, the file has [2, 2, 1]" in caught.value.problems[0]
