"""Two codes of four bits in one byte."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_pairs"]


def pack_pairs(codes: Tensor, *, high_first: bool = False) -> Tensor:
    """Contiguous uint8 codes below 16 `[..., 2 n]` as `[..., n]`; the first in the low half.

    Both are shifted at once: to take every second element is three times as slow.
    """
    both = codes.view(torch.int16)  # the first code is the low byte
    packed = (both << 4) | (both >> 8) if high_first else both | (both >> 4)
    return packed.to(torch.uint8)
