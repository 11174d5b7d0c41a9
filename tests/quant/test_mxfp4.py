"""gpt-oss experts against transformers' own unpacking."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

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
    assert torch.equal(dense.view(3, 10, 128).transpose(1, 2).bfloat16(), expected)


def test_it_is_not_written() -> None:
    with pytest.raises(InputError, match="read, not written"):
        writable("mxfp4")


def test_faults() -> None:
    stored = experts()
    (weight,) = find(quantizers.get("mxfp4"), CONFIG, stored).values()
    assert read(quantizers.get("mxfp4"), weight, stored).shape == (30, 128)
    stored[f"{PROJ}_scales"] = stored[f"{PROJ}_scales"][:2]
    with pytest.raises(InputError) as caught:
        find(quantizers.get("mxfp4"), CONFIG, stored)
    assert "do not fit" in caught.value.problems[0]
    del stored[f"{PROJ}_scales"]
    with pytest.raises(InputError) as caught:
        find(quantizers.get("mxfp4"), CONFIG, stored)
    assert caught.value.problems == (f"{PROJ}_scales is missing",)
