"""GPTQ against a packer written from the format's definition, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dora_convert.errors import InputError
from dora_convert.quant import quantizers
from tests.quant.engine import find, read_one

GPTQ = quantizers.get("gptq")


def pack_down(values: np.ndarray, bits: int) -> Tensor:
    """Code k of a column goes to word k // each, at bit (k % each) * bits."""
    each = 32 // bits
    words = np.zeros((-(-len(values) // each), values.shape[1]), dtype=np.uint32)
    for k, row in enumerate(values):
        words[k // each] |= row.astype(np.uint32) << np.uint32(k % each * bits)
    return torch.from_numpy(words.view(np.int32))


def checkpoint(
    bits: int, *, v2: bool, act_order: bool, out: int = 40, columns: int = 128, group: int = 32
) -> tuple[dict[str, Any], dict[str, Tensor], np.ndarray]:
    """Config, tensors, and the float64 weight `[out, in]` that they were made from."""
    rng = np.random.default_rng(0)
    groups = columns // group
    codes = rng.integers(0, 2**bits, size=(out, columns))
    zeros = rng.integers(0, 2**bits, size=(out, groups))
    zeros[0] = 0  # the first form borrows from its neighbour
    scales = rng.uniform(0.01, 1.0, size=(out, groups)).astype(np.float16)
    g_idx = np.arange(columns) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    dense = (codes - zeros[:, g_idx]) * scales[:, g_idx].astype(np.float64)
    kept = pack_down(zeros, bits).t().contiguous()
    if not v2:
        # gptqmodel, convert_gptq_v2_to_v1_format_module: one less in every code of the word.
        ones = sum(1 << shift for shift in range(0, 32, bits))
        kept = torch.from_numpy((kept.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
    tensors = {
        "a.qweight": pack_down(codes.T, bits),
        "a.qzeros": kept,
        "a.scales": torch.from_numpy(scales.T.copy()),
        "a.g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    words = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    if v2:
        words["checkpoint_format"] = "gptq_v2"
    return {"quantization_config": words}, tensors, dense


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("step", [None, 1, 7])
def test_values_are_those_that_were_packed(
    bits: int, v2: bool, act_order: bool, step: int | None
) -> None:
    config, tensors, dense = checkpoint(bits, v2=v2, act_order=act_order)
    ours = read_one(GPTQ, config, tensors, step=step)
    # A code of 8 bits times a float16 fits float32.
    np.testing.assert_array_equal(ours.numpy(), dense)


def test_faults_come_all_at_once() -> None:
    config, tensors, _ = checkpoint(4, v2=False, act_order=False)
    del tensors["a.g_idx"]
    _, others, _ = checkpoint(4, v2=False, act_order=False)
    tensors |= {name.replace("a.", "b."): tensor for name, tensor in others.items()}
    tensors["b.scales"] = tensors["b.scales"][:, :-1]
    with pytest.raises(InputError) as caught:
        find(GPTQ, config, tensors)
    assert caught.value.problems == (
        "a: g_idx missing",
        "b.scales F16 [4, 39] does not fit [out, in] = [40, 128]",
    )
    with pytest.raises(InputError) as caught:
        find(GPTQ, {"quantization_config": {"quant_method": "gptq", "bits": 3}}, tensors)
    assert caught.value.problems == ("config.json: 3 bits are not known (2, 4 or 8)",)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_group_that_is_not_there(index: int) -> None:
    config, tensors, _ = checkpoint(4, v2=True, act_order=True)
    tensors["a.g_idx"][3] = index
    with pytest.raises(InputError, match="there are 4") as caught:
        read_one(GPTQ, config, tensors)
    assert caught.value.where == ("a.g_idx",)
