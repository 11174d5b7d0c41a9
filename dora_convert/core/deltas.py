"""The forms that an update before scaling is stored in, as matrices `[out, in]`.

A convolution's update `[out, in, k...]` is flattened to `[out, in * k...]`. Sources: LoRA (arXiv
2106.09685); LyCORIS 4.1 `lycoris/modules/locon.py`, `loha.py`, `lokr.py` and arXiv 2309.14859.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from dora_convert.core.tensors import TensorRef

__all__ = ["Delta", "Factored", "Hadamard", "Kronecker", "LowRank", "Tucker"]


@dataclass(frozen=True, slots=True)
class LowRank:
    """`up @ down`."""

    down: TensorRef  # [rank, in]
    up: TensorRef  # [out, rank]

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.down.spec.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product, `[out, in]`."""
        return self.up.spec.shape[0], self.down.spec.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """That of the convolution, by the stored `[rank, in, k...]`."""
        return self.down.stored.shape[2:]

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """All that it is made of."""
        return self.down, self.up

    def transposed(self) -> LowRank:
        """The transpose of the product."""
        return LowRank(down=self.up.transposed(), up=self.down.transposed())


@dataclass(frozen=True, slots=True)
class Tucker:
    """A convolution's `sum over m, n of up[o, m] mid[m, n, k...] down[n, i]`."""

    down: TensorRef  # [inner, in]
    mid: TensorRef  # [rank, inner, k...]
    up: TensorRef  # [out, rank]

    @property
    def rank(self) -> int:
        """Of the flattened update, at most."""
        return self.mid.spec.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the update, `[out, in * k...]`."""
        return self.up.spec.shape[0], self.down.spec.shape[1] * math.prod(self.kernel)

    @property
    def kernel(self) -> tuple[int, ...]:
        """That of the convolution."""
        return self.mid.spec.shape[2:]

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """All that it is made of."""
        return self.down, self.mid, self.up


Factored: TypeAlias = LowRank | Tucker


@dataclass(frozen=True, slots=True)
class Hadamard:
    """`left * right`, element by element (LoHa)."""

    left: Factored
    right: Factored

    @property
    def rank(self) -> int:
        """Of the product, at most."""
        return self.left.rank * self.right.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product, `[out, in]`."""
        return self.left.shape

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """That of the convolution; None where flattened factors do not say."""
        return self.left.kernel if isinstance(self.left, Tucker) else None

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """All that it is made of."""
        return *self.left.tensors, *self.right.tensors


@dataclass(frozen=True, slots=True)
class Kronecker:
    """`kron(left, right)` (LoKr); `kernel` is that of `right`, whose flattened form is used."""

    left: TensorRef | LowRank  # [out 1, in 1]
    right: TensorRef | Factored  # [out 2, in 2 * k...]
    kernel: tuple[int, ...] | None = ()

    @property
    def rank(self) -> int:
        """Of the product, at most."""
        ranks = (min(m.spec.shape) if isinstance(m, TensorRef) else m.rank for m in self._factors)
        return math.prod(ranks)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product, `[out, in]`."""
        (a, b), (c, d) = (
            m.spec.shape if isinstance(m, TensorRef) else m.shape for m in self._factors
        )
        return a * c, b * d

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """All that it is made of."""
        parts = ((m,) if isinstance(m, TensorRef) else m.tensors for m in self._factors)
        return tuple(ref for part in parts for ref in part)

    @property
    def _factors(self) -> tuple[TensorRef | Factored, TensorRef | Factored]:
        return self.left, self.right


Delta: TypeAlias = LowRank | Tucker | Hadamard | Kronecker
