"""MLX affine against mlx itself."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch import Tensor

from dora_convert.errors import InputError
from tests.quant.engine import find, normal, read_one, same_bytes, scheme, write

MLX = scheme("mlx")
TYPES = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16, torch.float32: mx.float32}


def to_mlx(tensor: Tensor) -> mx.array:
    return mx.array(tensor.float().numpy()).astype(TYPES[tensor.dtype])


def to_torch(array: mx.array, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def official(weight: Tensor, bits: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """mlx's tensors, and its own dense weight computed in float32."""
    with mx.stream(mx.cpu):
        codes, scales, biases = mx.quantize(to_mlx(weight), group_size=group, bits=bits)
        dense = mx.dequantize(
            codes, scales.astype(mx.float32), biases.astype(mx.float32), group, bits
        )
    stored = {
        "a.weight": torch.from_numpy(np.array(codes)),
        "a.scales": to_torch(scales, weight.dtype),
        "a.biases": to_torch(biases, weight.dtype),
    }
    return stored, to_torch(dense, torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_bytes_are_those_of_mlx(dtype: torch.dtype) -> None:
    weight = normal(96, 512, dtype=dtype)
    weight[3] = 0
    weight[4] = weight[4].abs()
    expected, _ = official(weight, 4, 64)
    stored = write(MLX, weight, step=32)
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert same_bytes(tensor, expected[name]), name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_values_are_those_of_mlx(bits: int, group: int) -> None:
    stored, dense = official(normal(48, 256), bits, group)
    config = {"quantization": {"bits": bits, "group_size": group, "mode": "affine"}}
    ours = read_one(MLX, config, stored, step=7)
    # mlx may fuse the product and the sum into one rounding.
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-7)
    mine = stored["a.scales"].double().repeat_interleave(group, dim=1)
    bias = stored["a.biases"].double().repeat_interleave(group, dim=1)
    codes = ((ours.double() - bias) / mine).round()
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1


def test_a_module_with_bits_of_its_own() -> None:
    four, _ = official(normal(8, 128), 4, 64)
    eight, dense = official(normal(8, 128), 8, 32)
    stored = four | {name.replace("a.", "b."): tensor for name, tensor in eight.items()}
    words = {"bits": 4, "group_size": 64, "b": {"bits": 8, "group_size": 32}}
    found = find(MLX, {"quantization": words}, stored)
    assert found["b.weight"].settings == {"bits": 8, "group": 32}
    only = {name: tensor for name, tensor in stored.items() if name.startswith("b.")}
    ours = read_one(MLX, {"quantization": words}, only)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-7)


def test_config_is_what_mlx_lm_reads() -> None:
    """Both names, and no method; a dense module is `false` (mlx_lm/utils.py, class predicate)."""
    config = MLX.config(["lm_head"])
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "lm_head": False,
    }


def test_other_modes_are_not_detected() -> None:
    words = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    assert not MLX.detect({"quantization": words})


def test_faults_come_all_at_once() -> None:
    stored = write(MLX, normal(8, 128)) | write(MLX, normal(8, 128), name="b.weight")
    del stored["a.biases"]
    stored["b.scales"] = torch.ones(8, 3)
    with pytest.raises(InputError) as caught:
        find(MLX, MLX.config([]), stored)
    first, second = caught.value.problems
    assert first == "a.biases is missing"
    assert second.startswith("b.weight U32 [8, 16]: scales F32 [8, 3]")
