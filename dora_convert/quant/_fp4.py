"""E2M1, the 4-bit float of the OCP microscaling formats, two to a byte, the low half first."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LARGEST_FP4", "pack_fp4", "unpack_fp4"]

LARGEST_FP4 = 6.0
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_fp4(scaled: Tensor) -> Tensor:
    """Nearest codes of `scaled [n, in]`, ties to the even one: uint8 `[n, in / 2]`.

    What rounds to zero from below keeps its sign.
    """
    size = scaled.abs()
    codes = torch.zeros_like(size, dtype=torch.uint8)
    for middle, even_above in (
        (0.25, False),
        (0.75, True),
        (1.25, False),
        (1.75, True),
        (2.5, False),
        (3.5, True),
        (5.0, False),
    ):
        codes += (size >= middle) if even_above else (size > middle)
    codes |= (scaled < 0).to(torch.uint8) << 3
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Undo `pack_fp4`: float32 `[n, 2 * bytes]`."""
    table = torch.tensor((*_VALUES, *(-v for v in _VALUES)), device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)
    return table[codes.int()]
