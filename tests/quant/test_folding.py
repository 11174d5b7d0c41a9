"""A row's factor in its scales: the codes of a base on the grid stay what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dora_convert.core.protocols import Folding
from dora_convert.quant import quantizers
from tests.quant.engine import find, normal, read, same_bytes, spec_of, write

FOLDING = [name for name in quantizers.names() if isinstance(quantizers.get(name), Folding)]


@pytest.fixture(params=FOLDING)
def scheme(request: pytest.FixtureRequest) -> Any:
    return quantizers.get(str(request.param))


def stored(scheme: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """What the scheme makes of a weight, by role, and what it decodes to."""
    weight = normal(128, 256, dtype=dtype)
    tensors = write(scheme, weight)
    (found,) = find(scheme, scheme.config([]), tensors).values()
    by_role = {role: tensors[part.name] for role, part in found.parts.items()}
    return by_role, read(scheme, found, tensors)


def test_which_schemes_have_scales_of_one_row() -> None:
    assert set(FOLDING) == {"w4a16", "w8a16", "w8a8", "fp8_dynamic", "mlx"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_longer_rows_keep_their_codes(scheme: Any, dtype: torch.dtype) -> None:
    parts, dense = stored(scheme, dtype)
    factor = torch.linspace(0.8, 1.25, len(dense)).unsqueeze(1)
    layout = scheme.layout(spec_of("a.weight", dense.to(dtype)))
    scales = {role: parts[role].float() * factor for role in scheme.folds}
    got = scheme.quantize_under(layout, dense * factor, scales)
    codes = next(iter(layout.parts))
    assert same_bytes(got[codes], parts[codes])
    for role in scheme.folds:
        expected = (parts[role].double() * factor.double()).to(dtype)
        assert torch.allclose(got[role].double(), expected.double(), rtol=torch.finfo(dtype).eps)


def test_a_scale_of_zero_is_no_trap(scheme: Any) -> None:
    layout = scheme.layout(spec_of("a.weight", torch.zeros(2, 128)))
    shape = layout.parts[scheme.folds[0]].shape
    scales = {role: torch.zeros(shape) for role in scheme.folds}
    parts = scheme.quantize_under(layout, torch.zeros(2, 128), scales)
    assert all(bool(torch.isfinite(t.float()).all()) for t in parts.values())
