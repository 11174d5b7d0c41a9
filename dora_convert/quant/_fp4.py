"""E2M1, the 4-bit float of the OCP microscaling formats, two to a byte, the low half first."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_convert.quant._pairs import pack_pairs

__all__ = ["LARGEST_FP4", "pack_fp4", "unpack_fp4"]

LARGEST_FP4 = 6.0
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TABLE = torch.tensor((*_VALUES, *(-v for v in _VALUES)))
_ZERO = 48  # twice four times the largest


def _code(index: int) -> int:
    """Of all values whose floor and ceiling, in quarters, have this sum less `_ZERO`."""
    size = abs(index - _ZERO) / 8
    above = min(range(8), key=lambda code: (abs(_VALUES[code] - size), code % 2))
    return above | (8 if index < _ZERO else 0)


_CODES = torch.tensor([_code(index) for index in range(2 * _ZERO + 1)], dtype=torch.uint8)


def pack_fp4(scaled: Tensor) -> Tensor:
    """Nearest codes of `scaled [n, in]`, ties to the even one: uint8 `[n, in / 2]`.

    What rounds to zero from below keeps its sign.
    """
    quarters = scaled * 4
    # The sum tells a tie from what lies above it; every code changes at a multiple of a quarter.
    index = (quarters.floor() + quarters.ceil()).to(torch.int32).add_(_ZERO).clamp_(0, 2 * _ZERO)
    codes = (
        _CODES.to(scaled.device, non_blocking=True)
        .index_select(0, index.view(-1))
        .view(scaled.shape)
    )
    return pack_pairs(codes)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Undo `pack_fp4`: float32 `[n, 2 * bytes]`."""
    table = _TABLE.to(packed.device, non_blocking=True)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)
    return table[codes.int()]
