"""What is left of an update once the merged weight lies on a quantisation grid."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["SurvivalSums", "changed_codes", "survival_sums"]


@dataclass(slots=True)
class SurvivalSums:
    """Sums over elements, from which the figures follow; blocks add up.

    With W the base, W' the merged weight, T = W' - W the update and Q quantisation and decoding.
    """

    elements: int = 0
    changed: int = 0  # elements whose code in Q(W') is not that in Q(W)
    base: float = 0.0  # sum of W^2
    merged: float = 0.0  # sum of W'^2
    effect: float = 0.0  # sum of T^2
    kept: float = 0.0  # sum of (Q(W') - W) * T
    noise: float = 0.0  # sum of (Q(W') - W')^2
    plain: float = 0.0  # sum of (Q(W) - W)^2

    def add(self, other: SurvivalSums) -> None:
        """Accumulate another block."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def survival_sums(
    base: Tensor, merged: Tensor, stored: Tensor, plain: Tensor, changed: Tensor
) -> SurvivalSums:
    """One block `[n, in]` of W, W', Q(W') and Q(W), and the elements whose code is another one."""
    effect, error = merged - base, stored - merged
    return SurvivalSums(
        elements=base.numel(),
        changed=int(torch.count_nonzero(changed)),
        base=_dot(base, base),
        merged=_dot(merged, merged),
        effect=_dot(effect, effect),
        kept=_dot(effect, effect) + _dot(error, effect),
        noise=_dot(error, error),
        plain=_square(plain - base),
    )


def changed_codes(one: Tensor, other: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which of the codes of a `[n, in]` block differ; two in a byte, or one in each byte.

    The two in a byte are told in the order of the bits, which may not be that of the columns.
    """
    flat = one.contiguous().view(-1).view(torch.uint8)
    differ = flat ^ other.contiguous().view(-1).view(torch.uint8)
    count = shape[0] * shape[1]
    if differ.numel() < count:
        differ = torch.stack((differ & 15, differ >> 4), dim=1).view(-1)
    return differ[:count].view(shape) != 0


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def _square(a: Tensor) -> float:
    return _dot(a, a)
