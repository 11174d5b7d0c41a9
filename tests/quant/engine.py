"""A streaming engine in miniature: one weight in blocks, through the protocol alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dora_convert.core.protocols import Dequantizer, Quantizer
from dora_convert.core.quantized import QuantizedWeight
from dora_convert.core.tensors import TensorSpec
from dora_convert.quant import quantizers
from dora_convert.storage.dtypes import TORCH, from_torch

# Of matrices: what gpt-oss keeps its experts in has tests of its own.
WRITABLE = [
    n for n in quantizers.names() if isinstance(quantizers.get(n), Quantizer) and n != "mxfp4"
]


def scheme(name: str) -> Quantizer:
    found = quantizers.get(name)
    assert isinstance(found, Quantizer)
    return found


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, from_torch(tensor.dtype), tuple(tensor.shape))


def blocks(rows: int, step: int) -> list[tuple[int, int]]:
    return [(a, min(a + step, rows)) for a in range(0, rows, step)]


def write(
    quantizer: Quantizer, weight: Tensor, *, step: int | None = None, name: str = "a.weight"
) -> dict[str, Tensor]:
    """Stored tensors by name, each checked against the layout that was declared before."""
    return write_as(quantizer, quantizer.layout(spec_of(name, weight)), weight, step=step)


def write_as(
    quantizer: Quantizer,
    declared: QuantizedWeight,
    weight: Tensor,
    *,
    step: int | None = None,
    partners: tuple[Tensor, ...] = (),
) -> dict[str, Tensor]:
    spans = blocks(len(weight), step or len(weight))
    assert all(a % quantizer.row_multiple(declared) == 0 for a, _ in spans)
    statistic = None
    if quantizer.surveys:
        all_rows = [w[a:b] for w in (weight, *partners) for a, b in blocks(len(w), spans[0][1])]
        statistic = quantizer.gather([quantizer.survey(rows) for rows in all_rows])
    before = statistic if quantizer.two_pass else None
    out = {
        role: torch.empty(part.shape, dtype=TORCH[part.dtype])
        for role, part in declared.parts.items()
    }
    filled = dict.fromkeys(out, 0)
    for a, b in spans:
        pieces = quantizer.quantize(declared, weight[a:b], before)
        windows = quantizer.windows(declared, a, b)
        for role, piece in pieces.items():
            window = windows[role]
            assert window is not None
            assert window.axis == 0  # a block's bytes are one range of the file
            assert piece.dtype == out[role].dtype, role
            assert piece.shape == out[role][window.start : window.stop].shape, role
            out[role][window.start : window.stop] = piece
            filled[role] += window.stop - window.start
    for role, piece in quantizer.constants(declared, statistic).items():
        assert piece.dtype == out[role].dtype, role
        assert piece.shape == out[role].shape, role
        out[role] = piece
        filled[role] = len(piece) if piece.ndim else 0
    assert filled == {role: len(t) if t.ndim else 0 for role, t in out.items()}
    return {declared.parts[role].name: tensor for role, tensor in out.items()}


def find(
    quantizer: Dequantizer, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Mapping[str, QuantizedWeight]:
    specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}

    def load(name: str) -> bytes:
        return bytes(tensors[name].contiguous().view(-1).view(torch.uint8).tolist())

    return quantizer.find(config, specs, load)


def read(
    quantizer: Dequantizer,
    weight: QuantizedWeight,
    tensors: Mapping[str, Tensor],
    *,
    step: int | None = None,
) -> Tensor:
    """The dense weight, float32, block by block."""
    views = {
        role: tensors[part.name].contiguous().view(-1).view(TORCH[part.dtype]).view(part.shape)
        for role, part in weight.parts.items()
    }
    out = []
    for a, b in blocks(weight.rows, step or weight.rows):
        parts = {}
        for role, window in quantizer.windows(weight, a, b).items():
            view = views[role]
            parts[role] = (
                view
                if window is None
                else view.narrow(window.axis, window.start, window.stop - window.start)
            )
        rows = quantizer.dequantize(weight, parts, a, b)
        assert rows.dtype == torch.float32
        assert rows.shape == (b - a, weight.columns)
        out.append(rows)
    return torch.cat(out)


def read_one(
    quantizer: Dequantizer,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    step: int | None = None,
) -> Tensor:
    (weight,) = find(quantizer, config, tensors).values()
    return read(quantizer, weight, tensors, step=step)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    )


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[0, 0] = 0.3  # an outlier
    return weight.to(dtype)
