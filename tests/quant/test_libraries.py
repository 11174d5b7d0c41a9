"""Formats that are only read, against their libraries' own decoding (`fixtures/quantised`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dora_convert.errors import InputError
from dora_convert.quant import detect, quantizers
from tests.quant.engine import find, read_one

FOLDER = Path(__file__).parents[2] / "fixtures" / "quantised"


def names() -> list[tuple[str, str]]:
    found = []
    for file in sorted(FOLDER.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found += [(file.stem, case) for case in sorted(handle.metadata())]
    return found


def case(scheme: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Config, stored tensors, and what they decode to."""
    with safe_open(FOLDER / f"{scheme}.safetensors", "pt") as handle:
        config = json.loads(handle.metadata()[name])
        tensors = {
            key.partition("|")[2]: handle.get_tensor(key)
            for key in handle.keys()  # noqa: SIM118 - it is no mapping
            if key.startswith(f"{name}|")
        }
    return config, tensors, tensors.pop("expected")


def test_all_are_there() -> None:
    assert {scheme for scheme, _ in names()} == {"hqq", "torchao", "modelopt"}
    assert len(names()) == 16 + 7 + 3


@pytest.mark.parametrize(("scheme", "name"), names())
def test_decoded_as_the_library_does(scheme: str, name: str) -> None:
    config, tensors, expected = case(scheme, name)
    assert detect(config) == (scheme,)
    (weight,) = find(quantizers.get(scheme), config, tensors).values()
    assert weight.dense.name == "a.b.weight"
    assert weight.dense.shape == tuple(expected.shape)
    for step in (None, 1, 7, 16):
        got = read_one(quantizers.get(scheme), config, tensors, step=step)
        # ModelOpt has no sign on a zero.
        assert torch.equal(got.to(expected.dtype), expected), step


@pytest.mark.parametrize(("scheme", "name"), names())
def test_a_missing_scale_is_named(scheme: str, name: str) -> None:
    config, tensors, _ = case(scheme, name)
    for part in [key for key in tensors if key.endswith(("scale", "zero", "scale_2", "nbits"))]:
        if part.endswith(("input_scale", "round_zero")):  # not of the weight, or no matter now
            continue
        rest = {key: tensor for key, tensor in tensors.items() if key != part}
        with pytest.raises(InputError) as caught:
            find(quantizers.get(scheme), config, rest)
        assert all("a.b" in line for line in caught.value.problems)


@pytest.mark.parametrize(
    ("scheme", "name", "part", "value"),
    [
        ("hqq", "4 bits, axis 1, torch.bfloat16", "a.b.nbits", torch.tensor(5, dtype=torch.int32)),
        ("hqq", "4 bits, axis 1, torch.bfloat16", "a.b.axis", torch.tensor(2, dtype=torch.int32)),
        ("hqq", "4 bits, axis 1, torch.bfloat16", "a.b.group_size", torch.tensor(7.0)),
        ("hqq", "4 bits, axis 1, torch.bfloat16", "a.b.shape", torch.tensor([20, 95])),
        ("hqq", "4 bits, axis 1, torch.bfloat16", "a.b.quant_zero", torch.ones(1).byte()),
        ("torchao", "int8 by row", "a.b._weight_qdata", torch.zeros(20, 12, dtype=torch.int32)),
        ("torchao", "int8 by group", "a.b._weight_scale", torch.zeros(20, 5)),
        ("torchao", "int8 by group", "a.b._weight_zero_point", torch.zeros(20, 2)),
        ("modelopt", "nvfp4", "a.b.weight_scale", torch.zeros(20, 6)),
        ("modelopt", "fp8 by tensor", "a.b.weight_scale", torch.zeros(3)),
    ],
)
def test_what_does_not_fit_is_refused(scheme: str, name: str, part: str, value: Tensor) -> None:
    config, tensors, _ = case(scheme, name)
    with pytest.raises(InputError) as caught:
        find(quantizers.get(scheme), config, tensors | {part: value})
    assert all("a.b" in line for line in caught.value.problems)
