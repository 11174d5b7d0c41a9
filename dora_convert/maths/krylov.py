"""The largest singular triples of an operator that is only ever multiplied with.

Block Krylov iteration after Musco and Musco (NeurIPS 2015), on the randomised range finder of
Halko, Martinsson and Tropp (arXiv 0909.4061). A DoRA's effective update has a few large singular
values and then the slowly falling ones of the base weight itself, where a Krylov space of the same
number of products holds far more than power iteration does.

Long vectors stay where the operator gives them; small matrices are the host's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dora_convert.maths.lowrank import Factors, Operator, round_trip

__all__ = ["krylov_factors", "spans_everything"]

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
# The same where the space of the outputs so far is taken, which is worth half a step and saves a
# product: what it lacks is known but for what comes after the next step, so that errors are small.
_HALFWAY = 0.0033
_NARROW_SPACE = 5 * _NARROWEST  # of less, what comes next is not known well enough
_CONDITION = 1e-6  # of the Gram matrix, of which the inverse root is taken
_LEAST_FALL = 0.25  # of what a step gains to what all later ones do
# Of the lengths of columns' orthogonal parts: where rounding may not grow, and where it is mended.
_NEARLY, _ROUGHLY = 0.5, 0.03
_ROUNDING = 16  # units in the last place of the whole


def spans_everything(shape: tuple[int, int], rank: int) -> bool:
    """Whether the Krylov space for `rank` would be about the whole space: exact is cheaper then."""
    return _size(rank) >= min(shape)


def krylov_factors(
    operator: Operator,
    rank: int,
    generator: torch.Generator,
    square: float,
    likely: Tensor | None = None,
) -> Factors:
    """The `rank` largest singular triples, nearly, from products of both kinds in turn.

    `likely`, `[in, k]`, are inputs that T is thought to make much of; half of those to begin with
    are of their span.

    `square` is ||T||²: the iteration ends where further steps are not expected to make the residual
    smaller by more than a fraction of 0.2 %. The triples hold exactly as much of it as their
    `singular` say, to the operator's precision.
    """
    out, inner = operator.shape
    space = _Space(torch.empty((0, inner)), room=_size(rank) + _width(rank))
    fresh, _ = _factored(_start(inner, _width(rank), generator, likely), _NEARLY)
    for step in range(_MOST_STEPS):
        ahead = space.ahead(rank, square)
        if (outputs := space.outputs(rank, ahead)) is not None:
            return space.halfway(outputs, fresh)
        is_last = space.size + fresh.shape[1] >= inner or step + 1 == _MOST_STEPS
        if is_last or ahead.is_little(_TOLERANCE):
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


def _start(inner: int, width: int, generator: torch.Generator, likely: Tensor | None) -> Tensor:
    # Drawn in float32, which takes a fifth of the time.
    start = torch.randn((inner, min(width, inner)), generator=generator).double()
    if likely is not None:
        mixed = min(likely.shape[1], start.shape[1] // 2)
        mixture = torch.randn((likely.shape[1], mixed), generator=generator).double()
        start[:, :mixed] = torch.nn.functional.normalize(likely.double() @ mixture, dim=0)
        start[:, mixed:] /= inner**0.5  # of about the same length
    return start


def _size(rank: int) -> int:
    """The columns that a space for `rank` has in the end, typically."""
    return max(_STEPS * _NARROWEST, 9 * rank // 2)


def _width(rank: int) -> int:
    return max(_NARROWEST, -(-rank // (4 * _GRAIN)) * _GRAIN)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Shares of `square`, ||T||²: `energy` with the next block, `left` to all blocks after it."""

    square: float
    energy: float
    left: float

    def is_little(self, tolerance: float) -> bool:
        return self.left <= tolerance * max(self.square - self.energy, 0.0)


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Coordinates of the factors: `left` in the images, `right` in the basis and `onward`."""

    left: Tensor
    right: Tensor
    onward: Tensor  # in the block to come


@dataclass(slots=True)
class _Space:
    """A basis of inputs, block by block, and what T makes of it.

    `gram` is `basis.T @ T.T @ T @ basis`, which is block tridiagonal in a Krylov basis.
    """

    rows: Tensor  # [size or more, in]: the columns of the basis, and room for more
    room: int
    images: list[Tensor] = field(default_factory=list)  # [out, k] of each block
    gram: Tensor = field(default_factory=lambda: torch.empty((0, 0), dtype=torch.float64))
    energies: list[float] = field(default_factory=list)
    coupling: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.gram)

    @property
    def basis(self) -> Tensor:
        """`[in, size]`, column after column: pieces of rows take several times as long to move."""
        return self.rows[: self.size].T

    @property
    def near(self) -> int:
        """The columns of the last two blocks."""
        return sum(image.shape[1] for image in self.images[-2:])

    def add(self, block: Tensor, image: Tensor) -> None:
        # In the operator's precision: more would be made of rounding.
        self._reserve(self.size + block.shape[1], image)
        self.rows[self.size : self.size + block.shape[1]] = block.T
        self.images.append(image)
        wide = image.double()
        self.gram = _bordered(self.gram, self._border(image.shape[1]), (wide.T @ wide).cpu())

    def _reserve(self, count: int, image: Tensor) -> None:
        """Make room for so many columns; twice as many whenever there is too little."""
        if len(self.rows) < count:
            held = image.new_empty((max(self.room, 2 * count), self.rows.shape[1]))
            held[: self.size] = self.rows[: self.size]
            self.rows = held

    def couple(self, coupling: Tensor) -> None:
        """What `T.T @ T` makes of the last block, in terms of the one to come."""
        self.coupling = coupling.double().cpu()

    def _border(self, count: int) -> Tensor:
        """The Gram matrix of all blocks with the one to come, of which only the last sees it."""
        border = torch.zeros((self.size, count), dtype=torch.float64)
        if self.coupling is not None:
            border[-self.coupling.shape[1] :] = self.coupling.T
        return border

    def ahead(self, rank: int, square: float) -> _Ahead:
        """What the next block is expected to bring, and all after it.

        Of a space that is hardly larger than the rank, gains say nothing of those to come.
        """
        unknown = _Ahead(square, 0.0, float("inf"))
        if self.coupling is None or 2 * self.size < 3 * rank:
            return unknown
        self.energies.append(_largest(self.gram, rank))
        if len(self.energies) < 2:
            return unknown
        # The next block is known but for its own Gram matrix, which is much like the last one's.
        fresh, last = self.coupling.shape
        own = self.gram.diagonal()[-last:].median() * torch.eye(fresh, dtype=torch.float64)
        energy = _largest(_bordered(self.gram, self._border(fresh), own), rank)
        gain, before = energy - self.energies[-1], self.energies[-1] - self.energies[-2]
        # Steps gain less and less: as a geometric series what is left after the next one.
        fall = gain / before if before > 0 else 0.0
        left = gain * max(_LEAST_FALL, fall / (1 - fall)) if fall < 1 else float("inf")
        rounding = _ROUNDING * torch.finfo(self.images[-1].dtype).eps * square
        return _Ahead(square, energy, left - rounding)

    def outputs(self, rank: int, ahead: _Ahead) -> _Outputs | None:
        """What T holds on the outputs seen so far, if that is about all there is; else None."""
        is_large = self.size >= max(_NARROW_SPACE, 5 * rank // 2)
        if self.coupling is None or not is_large or not ahead.is_little(_HALFWAY):
            return None
        values, vectors = torch.linalg.eigh(self.gram)
        if values[0] <= _CONDITION * values[-1]:
            return None
        # With Q = images @ vectors / lengths, orthonormal, and the Krylov relation
        # T.T @ images = basis @ gram + fresh @ coupling (of the last block): T.T @ Q in the basis
        # and `fresh`, whose coordinates are `vectors * lengths` and `onward`.
        lengths = values.sqrt()
        onward = self.coupling @ vectors[-self.coupling.shape[1] :] / lengths
        energies, turned = torch.linalg.eigh(values.diag() + onward.T @ onward)
        energy, turned = float(energies[-rank:].sum()), turned.flip(1)[:, :rank]
        missed = ahead.left + max(0.0, ahead.energy - energy)
        if not replace(ahead, left=missed).is_little(_HALFWAY):
            return None
        left, right = vectors / lengths @ turned, vectors * lengths @ turned
        return _Outputs(left, right, onward @ turned)

    def factors(self, rank: int) -> Factors:
        """Of T restricted to the basis; `images` are gone then."""
        vectors = torch.linalg.eigh(self.gram).eigenvectors.flip(1)[:, :rank]
        left = self._imaged(vectors)
        right = self.basis @ vectors.to(self.basis)
        # Smaller ones than the root of the precision are lost in eigenvalues, not in these norms.
        norms, order = _falling(left)
        return Factors(
            _over(left, norms, order).cpu(), norms[order].cpu(), right[:, order].double().T.cpu()
        )

    def halfway(self, outputs: _Outputs, fresh: Tensor) -> Factors:
        """Of T restricted to the span of the images; these are gone then."""
        left = self._imaged(outputs.left)
        right = self.basis @ outputs.right.to(left)
        right.addmm_(fresh.to(left), outputs.onward.to(left))
        norms, order = _falling(right)
        return Factors(
            left[:, order].double().cpu(), norms[order].cpu(), _over(right, norms, order).T.cpu()
        )

    def _imaged(self, coordinates: Tensor) -> Tensor:
        """What T makes of vectors in the basis."""
        sizes = [image.shape[1] for image in self.images]
        parts = torch.split(coordinates.to(self.basis), sizes)
        images = self.images[0] @ parts[0]
        for image, part in zip(self.images[1:], parts[1:], strict=True):
            images.addmm_(image, part)
        self.images.clear()
        return images


def _falling(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The columns' lengths, float64, and their order from the longest."""
    lengths = torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)
    return lengths, lengths.argsort(descending=True, stable=True)


def _over(columns: Tensor, lengths: Tensor, order: Tensor) -> Tensor:
    """Unit columns, in this order, float64; zeros stay."""
    tiny = torch.finfo(torch.float64).tiny
    return columns[:, order].double().div_(lengths[order].clamp_min(tiny))


def _bordered(matrix: Tensor, column: Tensor, corner: Tensor) -> Tensor:
    """The symmetric `[[matrix, column], [column.T, corner]]`."""
    return torch.cat([torch.cat([matrix, column], dim=1), torch.cat([column.T, corner], dim=1)])


def _largest(matrix: Tensor, count: int) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-count:].sum())


def _orthonormal(block: Tensor, basis: Tensor, near: int) -> Tensor:
    """What spans `block` outside the span of `basis`, without what is rounding.

    Of `T.T @ T` times the end of a Krylov basis almost all lies in its last two blocks, which are
    `near` columns, and in the one to come. Without orthonormality to all of them it loses its
    rank within two steps.
    """
    noise = _ROUNDING * torch.finfo(block.dtype).eps * float(block.norm())
    block, lengths = _factored(_outside(block, basis[:, -near:]), _ROUGHLY)
    is_sound = lengths > noise
    block = block if bool(is_sound.all()) else block[:, is_sound.to(block.device)]
    if not block.shape[1]:
        return block
    # Twice is enough (Giraud, Langou, Rozloznik 2005).
    return _factored(_outside(block, basis), _NEARLY)[0]


def _factored(block: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the columns' span, and the lengths of what each adds to it.

    From the Cholesky factor of their Gram matrix, a few times as fast as Householder's vectors,
    where no length is less than `least` of another: 1 / `least` is what multiplies rounding.
    """
    lower, failed = torch.linalg.cholesky_ex((block.T @ block).double().cpu())
    lengths = lower.diagonal()
    if failed or bool(lengths.min() < least * lengths.max()):
        orthonormal, scales = torch.linalg.qr(block)
        return orthonormal, scales.diagonal().abs().cpu()
    inverse: Tensor = torch.linalg.inv(lower)
    return block @ inverse.T.to(block), lengths


def _outside(block: Tensor, basis: Tensor) -> Tensor:
    return torch.addmm(block, basis, basis.T @ block, alpha=-1)
