"""Updates `D = scaling * delta [out, in]` as operators, in the forms that `core.deltas` stores.

A factor holds the scaling already. D is never formed whole: what is, is a block of rows in a
caller's buffer, and products go through the factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Delta", "Dense", "Factor", "Hadamard", "Kronecker", "LowRank", "nothing"]


class Delta(ABC):
    """What can be done with any D."""

    @abstractmethod
    def to(self, device: torch.device) -> Delta:
        """The same there."""

    @abstractmethod
    def add_to(self, rows: Tensor, start: int) -> None:
        """`rows [n, in]` plus the rows of D from `start` on, in place."""

    def fill(self, rows: Tensor, start: int) -> None:
        """`rows [n, in]` become the rows of D from `start` on."""
        self.add_to(rows.zero_(), start)

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """`D @ x`: `[in, k]` to `[out, k]`."""

    @abstractmethod
    def transposed_times(self, y: Tensor) -> Tensor:
        """`D.T @ y`: `[out, k]` to `[in, k]`."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A factor of a Kronecker product that was trained whole."""

    matrix: Tensor  # [out, in]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def to(self, device: torch.device) -> Dense:
        """The same there."""
        return Dense(self.matrix.to(device))

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows, as often as they are named."""
        return self.matrix[index]

    def times(self, x: Tensor) -> Tensor:
        """`[in, k]` to `[out, k]`."""
        return self.matrix @ x

    def transposed_times(self, y: Tensor) -> Tensor:
        """`[out, k]` to `[in, k]`."""
        return self.matrix.T @ y


@dataclass(frozen=True, slots=True)
class LowRank(Delta):
    """`up @ down`."""

    up: Tensor  # [out, rank]
    down: Tensor  # [rank, in]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.up.shape[0], self.down.shape[1]

    def to(self, device: torch.device) -> LowRank:
        """See `Delta`."""
        return LowRank(self.up.to(device), self.down.to(device))

    def transposed(self) -> LowRank:
        """The transpose of the product."""
        return LowRank(self.down.T, self.up.T)

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows, as often as they are named."""
        return self.up[index] @ self.down

    def add_to(self, rows: Tensor, start: int) -> None:
        """See `Delta`."""
        rows.addmm_(self.up[start : start + len(rows)], self.down)

    def fill(self, rows: Tensor, start: int) -> None:
        """See `Delta`."""
        torch.matmul(self.up[start : start + len(rows)], self.down, out=rows)

    def times(self, x: Tensor) -> Tensor:
        """See `Delta`."""
        return self.up @ (self.down @ x)

    def transposed_times(self, y: Tensor) -> Tensor:
        """See `Delta`."""
        return self.down.T @ (self.up.T @ y)

    def row_squares(self) -> Tensor:
        """The squared norms of the product's rows, float64 `[out]`, from a small Gram matrix."""
        up, down = self.up.double(), self.down.double()
        return ((up @ (down @ down.T)) * up).sum(dim=1).clamp_min(0)

    def column_squares(self) -> Tensor:
        """The same of its columns, `[in]`."""
        up, down = self.up.double(), self.down.double()
        return (((up.T @ up) @ down) * down).sum(dim=0).clamp_min(0)


def nothing(out: int, inner: int, dtype: torch.dtype) -> LowRank:
    """`[out, inner]` of rank 0."""
    return LowRank(torch.zeros((out, 0), dtype=dtype), torch.zeros((0, inner), dtype=dtype))


Factor: TypeAlias = Dense | LowRank


@dataclass(frozen=True, slots=True)
class Hadamard(Delta):
    """`left * right`, element by element."""

    left: LowRank
    right: LowRank

    def to(self, device: torch.device) -> Hadamard:
        """See `Delta`."""
        return Hadamard(self.left.to(device), self.right.to(device))

    def add_to(self, rows: Tensor, start: int) -> None:
        """See `Delta`; two blocks of memory."""
        span = slice(start, start + len(rows))
        rows.addcmul_(self.left.rows(span), self.right.rows(span))

    def times(self, x: Tensor) -> Tensor:
        """See `Delta`: the sum over the left rank of `diag(up) right diag(down)`."""
        image = x.new_zeros((len(self.left.up), x.shape[1]))
        for up, down in zip(self.left.up.T, self.left.down, strict=True):
            image.addcmul_(up.unsqueeze(1), self.right.times(down.unsqueeze(1) * x))
        return image

    def transposed_times(self, y: Tensor) -> Tensor:
        """See `Delta`."""
        return Hadamard(self.left.transposed(), self.right.transposed()).times(y)


@dataclass(frozen=True, slots=True)
class Kronecker(Delta):
    """The rows `first:first + count` of `kron(left, right)`."""

    left: Factor
    right: Factor
    first: int
    count: int

    def to(self, device: torch.device) -> Kronecker:
        """See `Delta`."""
        return Kronecker(self.left.to(device), self.right.to(device), self.first, self.count)

    def add_to(self, rows: Tensor, start: int) -> None:
        """See `Delta`; memory for one row of either factor, for every row."""
        (_, outer), (height, inner) = self.left.shape, self.right.shape
        first = self.first + start
        index = torch.arange(first, first + len(rows), device=rows.device)
        left = self.left.rows(index // height)
        right = self.right.rows(index % height)
        rows.view(len(rows), outer, inner).addcmul_(left.unsqueeze(2), right.unsqueeze(1))

    def times(self, x: Tensor) -> Tensor:
        """See `Delta`."""
        sizes = self.left.shape[1], self.right.shape[1]
        whole = _kronecker_times(self.left.times, self.right.times, x, sizes)
        return whole[self.first : self.first + self.count]

    def transposed_times(self, y: Tensor) -> Tensor:
        """See `Delta`."""
        sizes = self.left.shape[0], self.right.shape[0]
        whole = y.new_zeros((sizes[0] * sizes[1], y.shape[1]))
        whole[self.first : self.first + self.count] = y
        return _kronecker_times(
            self.left.transposed_times, self.right.transposed_times, whole, sizes
        )


def _kronecker_times(
    left: Callable[[Tensor], Tensor],
    right: Callable[[Tensor], Tensor],
    x: Tensor,
    sizes: tuple[int, int],
) -> Tensor:
    """`kron(left, right) @ x` for `x [outer * inner, k]`, each factor given as its product."""
    (outer, inner), k = sizes, x.shape[1]
    image = right(x.reshape(outer, inner, k).transpose(0, 1).reshape(inner, outer * k))
    height = len(image)
    image = left(image.reshape(height, outer, k).transpose(0, 1).reshape(outer, height * k))
    return image.reshape(len(image) * height, k)
