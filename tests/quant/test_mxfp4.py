"""gpt-oss experts against transformers' own unpacking."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dora_convert.core.protocols import Quantizer
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError
from dora_convert.quant import quantizers, writable
from tests.quant.engine import find, read, read_one

CONFIG = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
PROJ = "model.layers.0.mlp.experts.gate_up_proj"


def experts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{PROJ}_blocks": torch.randint(0, 256, (3, 10, 4, 16), generator=generator).byte(),
        f"{PROJ}_scales": torch.randint(100, 140, (3, 10, 4), generator=generator).byte(),
        f"{PROJ}_bias": torch.zeros(3, 10),
    }


@pytest.mark.parametrize("step", [None, 1, 7])
def test_values_are_those_of_transformers(step: int | None) -> None:
    stored = experts()
    dense = read_one(quantizers.get("mxfp4"), CONFIG, stored, step=step)
    expected = convert_moe_packed_tensors(stored[f"{PROJ}_blocks"], stored[f"{PROJ}_scales"])
    assert expected.shape == (3, 128, 10)  # [experts, in, out]
    assert torch.equal(dense.view(3, 128, 10).bfloat16(), expected)


@pytest.mark.parametrize("step", [1, 2])
def test_values_on_the_grid_come_back(step: int) -> None:
    """Codes and exponents are the ones before, wherever a group has its largest code."""
    stored = experts()
    stored[f"{PROJ}_blocks"][..., 0] = 0x77  # 6, so that the peak tells the exponent
    scheme = writable("mxfp4")
    assert isinstance(scheme, Quantizer)
    (weight,) = find(scheme, CONFIG, stored).values()
    dense = read(scheme, weight, stored)
    for start in range(0, 3, step):
        parts = scheme.quantize(weight, dense[start : start + step])
        rows = slice(start, start + step)
        assert torch.equal(parts["scales"], stored[f"{PROJ}_scales"][rows])
        assert torch.equal(parts["blocks"], with_one_zero(stored[f"{PROJ}_blocks"][rows]))


def with_one_zero(blocks: torch.Tensor) -> torch.Tensor:
    """A zero that is negative is stored as a plain one."""
    low, high = blocks & 15, blocks >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)


def test_zeros_and_what_does_not_fit() -> None:
    scheme = writable("mxfp4")
    weight = scheme.layout(TensorSpec(PROJ, DType.BF16, (2, 64, 3)))
    parts = scheme.quantize(weight, torch.zeros(2, 192))
    assert not scheme.dequantize(weight, parts, 0, 2).any()
    for shape in ((2, 40, 3), (64, 3), (0, 64, 3)):
        with pytest.raises(InputError) as caught:
            scheme.layout(TensorSpec(PROJ, DType.BF16, shape))
        assert str(list(shape)) in caught.value.where[0]
    assert scheme.takes(TensorSpec(PROJ, DType.BF16, (2, 64, 3)))
    assert not scheme.takes(TensorSpec("model.layers.0.q_proj.weight", DType.BF16, (64, 64)))


def test_faults() -> None:
    stored = experts()
    (weight,) = find(quantizers.get("mxfp4"), CONFIG, stored).values()
    assert weight.shape == (3, 128, 10)
    assert read(quantizers.get("mxfp4"), weight, stored).shape == (3, 1280)
    stored[f"{PROJ}_scales"] = stored[f"{PROJ}_scales"][:2]
    with pytest.raises(InputError) as caught:
        find(quantizers.get("mxfp4"), CONFIG, stored)
    assert "do not fit" in caught.value.problems[0]
    del stored[f"{PROJ}_scales"]
    with pytest.raises(InputError) as caught:
        find(quantizers.get("mxfp4"), CONFIG, stored)
    assert caught.value.problems == (f"{PROJ}_scales is missing",)
