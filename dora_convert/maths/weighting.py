"""The best low-rank approximation where inputs differ in what they matter.

The error that counts is of outputs: E||(T - P) x||² = ||(T - P) L||² for inputs of second moment
`E[x x.T] = L L.T`. With the first left singular vectors U of `T L`, `P = U U.T T` is its minimum
over all P of that rank: `U U.T T L` is the best approximation of `T L` (Eckart and Young, 1936),
and no P makes anything nearer of it. L is never inverted, and may lack directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_convert.maths.lowrank import Factors, Operator, round_trip

__all__ = ["Weight", "Weighted", "unweighted"]


@dataclass(frozen=True, slots=True)
class Weight:
    """The second moment of a layer's inputs, `factor @ factor.T + diag(diagonal)²`, float64.

    `factor` is `[in, k]`, `diagonal` `[in]`; either may be None, which adds nothing.
    """

    factor: Tensor | None
    diagonal: Tensor | None

    def to(self, device: torch.device) -> Weight:
        """The same on a device."""
        factor = None if self.factor is None else self.factor.to(device)
        return Weight(factor, None if self.diagonal is None else self.diagonal.to(device))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        held = self.factor if self.diagonal is None else self.diagonal
        assert held is not None
        return held.device

    @property
    def width(self) -> int:
        """Columns of `L = [factor, diag(diagonal)]`."""
        factor = 0 if self.factor is None else self.factor.shape[1]
        return factor + (0 if self.diagonal is None else len(self.diagonal))

    def times(self, x: Tensor) -> Tensor:
        """`L @ x`: `[width, k]` to `[in, k]`."""
        if self.factor is None:
            assert self.diagonal is not None
            return self.diagonal.unsqueeze(1) * x
        k = self.factor.shape[1]
        result = self.factor @ x[:k]
        return result if self.diagonal is None else result + self.diagonal.unsqueeze(1) * x[k:]

    def transposed_times(self, y: Tensor) -> Tensor:
        """`L.T @ y`: `[in, k]` to `[width, k]`."""
        parts = [] if self.factor is None else [self.factor.T @ y]
        parts += [] if self.diagonal is None else [self.diagonal.unsqueeze(1) * y]
        return torch.cat(parts)

    def square(self, operator: Operator, columns: Tensor) -> float:
        """||T L||²; `columns` are the squared norms of T's columns, `[in]`."""
        total = 0.0
        if self.factor is not None:
            total += float(operator.times(self.factor).double().square().sum())
        if self.diagonal is not None:
            total += float((columns.double() * self.diagonal.square()).sum())
        return total


@dataclass(frozen=True, slots=True)
class Weighted:
    """`T L` as an operator `[out, width]`."""

    operator: Operator
    weight: Weight

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, width)`."""
        return self.operator.shape[0], self.weight.width

    def times(self, x: Tensor) -> Tensor:
        """`T @ L @ x`."""
        return self.operator.times(self.weight.times(x.to(self.weight.device).double()))

    def transposed_times(self, y: Tensor) -> Tensor:
        """`L.T @ T.T @ y`."""
        return self.weight.transposed_times(self.operator.transposed_times(y).double())

    def round_trip(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`T @ L @ x` and `L.T @ T.T @ T @ L @ x`."""
        inputs = self.weight.times(x.to(self.weight.device).double())
        image, returned = round_trip(self.operator, inputs)
        return image, self.weight.transposed_times(returned.double())


def unweighted(operator: Operator, left: Tensor) -> Factors:
    """`left @ left.T @ T` for orthonormal columns; what each of them holds of ||T|| is `singular`.

    These need not fall: the columns are in the order of what they hold of `T L`.
    """
    rows = operator.transposed_times(left).double().cpu().T
    norms = rows.norm(dim=1)
    return Factors(left, norms, rows / norms.clamp_min(torch.finfo(norms.dtype).tiny).unsqueeze(1))
