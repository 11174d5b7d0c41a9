"""What a verification has seen so far, and how elements are compared with the exact ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Tally", "compare"]


@dataclass(slots=True)
class Tally:
    """Sums over elements, and differences that were found."""

    modules: set[str] = field(default_factory=set)
    rows: int = 0
    compared: int = 0
    elements: int = 0
    off: int = 0
    noise: float = 0.0
    effect: float = 0.0
    kept: float = 0.0
    differences: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take over what another job found."""
        self.modules |= other.modules
        self.differences += other.differences
        for name in ("rows", "compared", "elements", "off", "noise", "effect", "kept"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def compare(got: Tensor, exact: Tensor, base: Tensor, tolerance: float, tally: Tally) -> int:
    """Number of elements off by more than `tolerance` units in the last place."""
    rounded = exact.to(got.dtype)
    info = torch.finfo(got.dtype)
    # Float32 sums of a row are good to a few times 1e-7 of its largest element, no further.
    slack = exact.abs().amax(dim=1, keepdim=True) * 2e-7 if info.bits == 16 else 1e-14
    limit = tolerance * info.eps * exact.abs() + info.tiny + slack
    value = got.double()
    tally.elements += got.numel()
    tally.off += int((got != rounded).sum())
    tally.noise += float((value - exact).square().sum())
    tally.effect += float((exact - base).square().sum())
    tally.kept += float(((value - base) * (exact - base)).sum())
    return int((~((value - exact).abs() <= limit)).sum())
