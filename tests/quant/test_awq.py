"""AWQ against compressed-tensors' own conversion of AutoAWQ checkpoints."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from torch import Tensor

from dora_convert.errors import InputError
from dora_convert.quant import quantizers
from tests.quant.engine import find, read_one

AWQ = quantizers.get("awq")
CONFIG = {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}


def checkpoint(out: int = 48, columns: int = 256, group: int = 64) -> dict[str, Tensor]:
    """Random words are a valid checkpoint."""
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).int()

    return {
        "a.qweight": words(columns, out // 8),
        "a.qzeros": words(columns // group, out // 8),
        "a.scales": (torch.rand(columns // group, out, generator=generator) + 0.01).half(),
    }


@pytest.mark.parametrize("step", [None, 1, 5, 8, 20])
def test_values_are_those_of_the_conversion(step: int | None) -> None:
    stored = checkpoint()
    converter = AutoAWQConverter(group_size=64)
    plan = converter.update_config(None).config_groups["config_group_0"]
    local = {n.removeprefix("a."): t for n, t in converter.process(dict(stored)).items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    expected = compressor.decompress(local, plan)["weight"]
    assert torch.equal(read_one(AWQ, CONFIG, stored, step=step).half(), expected)


def test_faults_come_all_at_once() -> None:
    stored = checkpoint() | {"b.qweight": torch.zeros(8, 1, dtype=torch.int32)}
    stored["a.scales"] = stored["a.scales"][:, :-1]
    config = {"quantization_config": {"quant_method": "awq", "bits": 3, "version": "gemv"}}
    with pytest.raises(InputError) as caught:
        find(AWQ, config, stored)
    assert len(caught.value.problems) == 4
    assert caught.value.problems[-1] == "b.qzeros is missing"
