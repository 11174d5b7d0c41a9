"""What is left of an update once the merged weight lies on a quantisation grid."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["BlockSums", "SurvivalSums", "changed_codes", "survival_sums"]


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


@dataclass(frozen=True, slots=True)
class BlockSums:
    """The sums of one block, still where they were computed: nothing is waited for."""

    elements: int
    changed: Tensor
    products: Tensor  # [6]: W W, W' W', T T, E T, E E, P P

    def settled(self) -> SurvivalSums:
        """The same as plain numbers."""
        base, merged, effect, lost, noise, plain = self.products.cpu().tolist()
        return SurvivalSums(
            elements=self.elements,
            changed=int(self.changed),
            base=base,
            merged=merged,
            effect=effect,
            kept=effect + lost,
            noise=noise,
            plain=plain,
        )


def survival_sums(
    base: Tensor, merged: Tensor, stored: Tensor, plain: Tensor, changed: Tensor
) -> BlockSums:
    """One block `[n, in]` of W, W', Q(W') and Q(W), and the elements whose code is another one."""
    effect, error, plain_error = merged - base, stored - merged, plain - base
    pairs = (
        (base, base),
        (merged, merged),
        (effect, effect),
        (error, effect),
        (error, error),
        (plain_error, plain_error),
    )
    products = torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in pairs])
    return BlockSums(base.numel(), torch.count_nonzero(changed), products)


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
