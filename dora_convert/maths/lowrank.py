"""The best low-rank approximation of an operator that is only ever multiplied with.

Block Krylov iteration after Musco and Musco (NeurIPS 2015), on the randomised range finder of
Halko, Martinsson and Tropp (arXiv 0909.4061). A DoRA's effective update has a few large singular
values and then the slowly falling ones of the base weight itself, where a Krylov space of the same
number of products holds far more than power iteration does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Factors",
    "Flipped",
    "Operator",
    "Streamed",
    "exact_factors",
    "krylov_factors",
    "round_trip",
    "spans_everything",
]

# Narrow blocks find as much with fewer columns in all, wide ones with fewer readings and faster
# products: a quarter of the rank takes the least time from rank 64 on. Of singular values that are
# exactly equal a block finds as many as it has columns. A multiple of 16 fills the registers of a
# matrix product.
_NARROWEST, _GRAIN = 32, 16
_STEPS = 6  # what is typical of narrow blocks
_MOST_STEPS = 24
# What is thought to be left to gain may be this share of the squared residual: half of it is the
# share of the residual itself, 0.11 %, and errors of the estimate leave that below 0.2 %.
_TOLERANCE = 0.0022
_LEAST_FALL = 0.25  # of what a step gains to what all later ones do
_ROUNDING = 16  # units in the last place of the whole


class Operator(Protocol):
    """A matrix `[out, in]` that is too large, or too costly, to be held."""

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


def spans_everything(shape: tuple[int, int], rank: int) -> bool:
    """Whether the Krylov space for `rank` would be about the whole space: exact is cheaper then."""
    return _size(rank) >= min(shape)


def krylov_factors(
    operator: Operator, rank: int, generator: torch.Generator, square: float | None = None
) -> Factors:
    """The `rank` largest singular triples, nearly, from products of both kinds in turn.

    `square` is ||T||²: with it the iteration ends where further steps are not expected to make the
    residual smaller by more than a fraction of 0.2 %, else at what is typical. The triples hold
    exactly as much of ||T||² as their `singular` say, to the operator's precision.
    """
    out, inner = operator.shape
    start = torch.randn((inner, _width(rank)), generator=generator, dtype=torch.float64)
    space = _Space(start[:, :0])
    fresh = torch.linalg.qr(start[:, :inner]).Q
    for step in range(_MOST_STEPS):
        is_last = space.size + fresh.shape[1] >= inner or step + 1 == _MOST_STEPS
        if is_last or space.is_near(rank, square):
            space.add(fresh, operator.times(fresh))
            break
        image, returned = round_trip(operator, fresh)
        space.add(fresh, image)
        # No more directions than there are left: a basis of too many would count some twice.
        returned = returned.to(image.dtype)
        fresh = _orthonormal(returned[:, : inner - space.size], space.basis, near=space.near)
        if not fresh.shape[1]:  # T has no more
            break
        space.couple(fresh.T @ returned)
    return space.factors(min(rank, out, inner))


def _size(rank: int) -> int:
    """The columns that a space for `rank` has in the end, typically."""
    return max(_STEPS * _NARROWEST, 9 * rank // 2)


def _width(rank: int) -> int:
    return max(_NARROWEST, -(-rank // (4 * _GRAIN)) * _GRAIN)


@dataclass(slots=True)
class _Space:
    """A basis of inputs, block by block, and what T makes of it.

    `gram` is `basis.T @ T.T @ T @ basis`, which is block tridiagonal in a Krylov basis.
    """

    basis: Tensor  # [in, size]
    images: list[Tensor] = field(default_factory=list)  # [out, k] of each block
    gram: Tensor = field(default_factory=lambda: torch.empty((0, 0), dtype=torch.float64))
    energies: list[float] = field(default_factory=list)
    coupling: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.gram)

    @property
    def near(self) -> int:
        """The columns of the last two blocks."""
        return sum(image.shape[1] for image in self.images[-2:])

    def add(self, block: Tensor, image: Tensor) -> None:
        # In the operator's precision: more would be made of rounding. Column after column, since
        # pieces of rows take several times as long to move.
        basis, block = self.basis.to(image.dtype), block.to(image.dtype)
        self.basis = torch.cat([basis.T, block.T]).T
        self.images.append(image)
        wide = image.double()
        self.gram = _bordered(self.gram, self._border(image.shape[1]), wide.T @ wide)

    def couple(self, coupling: Tensor) -> None:
        """What `T.T @ T` makes of the last block, in terms of the one to come."""
        self.coupling = coupling.double()

    def _border(self, count: int) -> Tensor:
        """The Gram matrix of all blocks with the one to come, of which only the last sees it."""
        border = torch.zeros((self.size, count), dtype=torch.float64)
        if self.coupling is not None:
            border[-self.coupling.shape[1] :] = self.coupling.T
        return border

    def is_near(self, rank: int, square: float | None) -> bool:
        """Whether the next block is the last that matters."""
        if square is None:
            return self.size >= _size(rank) - _width(rank)
        # Of a space that is hardly larger than the rank, gains say nothing of those to come.
        if self.coupling is None or 2 * self.size < 3 * rank:
            return False
        self.energies.append(_largest(self.gram, rank))
        if len(self.energies) < 2:
            return False
        # The next block is known but for its own Gram matrix, which is much like the last one's.
        fresh, last = self.coupling.shape
        own = self.gram.diagonal()[-last:].median() * torch.eye(fresh, dtype=torch.float64)
        energy = _largest(_bordered(self.gram, self._border(fresh), own), rank)
        gain, before = energy - self.energies[-1], self.energies[-1] - self.energies[-2]
        # Steps gain less and less: as a geometric series what is left after the next one.
        fall = gain / before if before > 0 else 0.0
        left = gain * max(_LEAST_FALL, fall / (1 - fall)) if fall < 1 else float("inf")
        rounding = _ROUNDING * torch.finfo(self.images[-1].dtype).eps * square
        return left <= _TOLERANCE * max(square - energy, 0.0) + rounding

    def factors(self, rank: int) -> Factors:
        """Of T restricted to the basis; `images` are gone then."""
        vectors = torch.linalg.eigh(self.gram).eigenvectors.flip(1)[:, :rank].to(self.basis.dtype)
        parts = torch.split(vectors, [image.shape[1] for image in self.images])
        left = self.images[0] @ parts[0]
        for image, part in zip(self.images[1:], parts[1:], strict=True):
            left.addmm_(image, part)
        self.images.clear()
        right = self.basis @ vectors
        # Smaller ones than the root of the precision are lost in eigenvalues, not in these norms.
        norms = torch.linalg.vector_norm(left, dim=0, dtype=torch.float64)
        singular, order = norms.sort(descending=True, stable=True)
        left = left[:, order].double().div_(singular.clamp_min(torch.finfo(singular.dtype).tiny))
        return Factors(left, singular, right[:, order].double().T)


def _bordered(matrix: Tensor, column: Tensor, corner: Tensor) -> Tensor:
    """The symmetric `[[matrix, column], [column.T, corner]]`."""
    return torch.cat([torch.cat([matrix, column], dim=1), torch.cat([column.T, corner], dim=1)])


def _largest(matrix: Tensor, count: int) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-count:].sum())


def exact_factors(operator: Operator) -> Factors:
    """All singular triples, from the Gram matrix of the smaller side in float64.

    Singular values below 1e-8 of the largest drown in rounding; nothing that depends on them is
    distinguishable from zero in the 32-bit files that these factors go into.
    """
    out, inner = operator.shape
    if out > inner:
        return exact_factors(Flipped(operator)).transposed()
    # Rows of T in slices of the identity: T itself is never needed twice.
    matrix = operator.transposed_times(torch.eye(out, dtype=torch.float64)).double().T
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


def _orthonormal(block: Tensor, basis: Tensor, near: int) -> Tensor:
    """What spans `block` outside the span of `basis`, without what is rounding.

    Of `T.T @ T` times the end of a Krylov basis almost all lies in its last two blocks, which are
    `near` columns, and in the one to come. Without orthonormality to all of them it loses its
    rank within two steps.
    """
    noise = _ROUNDING * torch.finfo(block.dtype).eps * float(block.norm())
    block, scales = torch.linalg.qr(_outside(block, basis[:, -near:]))
    is_sound = scales.diagonal().abs() > noise
    block = block if bool(is_sound.all()) else block[:, is_sound]
    # Twice is enough (Giraud, Langou, Rozloznik 2005).
    orthonormal: Tensor = torch.linalg.qr(_outside(block, basis)).Q
    return orthonormal


def _outside(block: Tensor, basis: Tensor) -> Tensor:
    return block - basis @ (basis.T @ block)
