"""Low-rank factors of an operator that is only ever multiplied with, and all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Factors", "Flipped", "Operator", "Streamed", "exact_factors", "round_trip"]


class Operator(Protocol):
    """A matrix `[out, in]` that is too large, or too costly, to be held.

    Vectors may come from anywhere; products are on the device that the operator computes on.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        ...

    def times(self, x: Tensor) -> Tensor:
        """`T @ x`: `[in, k]` to `[out, k]`, in the operator's own precision."""
        ...

    def transposed_times(self, y: Tensor) -> Tensor:
        """`T.T @ y`: `[out, k]` to `[in, k]`."""
        ...


@runtime_checkable
class Streamed(Operator, Protocol):
    """One whose rows pass by: both products together cost one reading."""

    def round_trip(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`T @ x` and `T.T @ T @ x`."""
        ...


def round_trip(operator: Operator, x: Tensor) -> tuple[Tensor, Tensor]:
    """`T @ x` and `T.T @ T @ x`, as cheaply as the operator can."""
    if isinstance(operator, Streamed):
        return operator.round_trip(x)
    image = operator.times(x)
    return image, operator.transposed_times(image)


@dataclass(frozen=True, slots=True)
class Factors:
    """`left [out, k] @ diag(singular [k]) @ right [k, in]`, singular values falling, float64."""

    left: Tensor
    singular: Tensor
    right: Tensor

    def truncated(self, rank: int) -> Factors:
        """The first `rank` of them, or all if there are fewer."""
        return Factors(self.left[:, :rank], self.singular[:rank], self.right[:rank])

    def transposed(self) -> Factors:
        """Those of the transposed matrix."""
        return Factors(self.right.T, self.singular, self.left.T)


def exact_factors(operator: Operator) -> Factors:
    """All singular triples, from the Gram matrix of the smaller side in float64.

    Singular values below 1e-8 of the largest drown in rounding; nothing that depends on them is
    distinguishable from zero in the 32-bit files that these factors go into.
    """
    out, inner = operator.shape
    if out > inner:
        return exact_factors(Flipped(operator)).transposed()
    # Rows of T in slices of the identity: T itself is never needed twice.
    matrix = operator.transposed_times(torch.eye(out, dtype=torch.float64)).double().cpu().T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors.flip(1)
    singular = values.flip(0).clamp_min(0).sqrt()
    floor = singular[0] * 1e-8
    used = int((singular > floor).sum())
    left, singular = left[:, :used], singular[:used]
    return Factors(left, singular, (left.T @ matrix) / singular.unsqueeze(1))


@dataclass(frozen=True, slots=True)
class Flipped:
    """The transposed operator."""

    operator: Operator

    @property
    def shape(self) -> tuple[int, int]:
        """`(in, out)`."""
        out, inner = self.operator.shape
        return inner, out

    def times(self, x: Tensor) -> Tensor:
        """`T.T @ x`."""
        return self.operator.transposed_times(x)

    def transposed_times(self, y: Tensor) -> Tensor:
        """`T @ y`."""
        return self.operator.times(y)
