"""Effective updates to low-rank factors: several modules at once, the same for any thread count."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_convert.core.lora import LoraModule, RankChoice
from dora_convert.core.plan import Piece
from dora_convert.core.tensors import TensorRef
from dora_convert.execution.decoding import open_reader
from dora_convert.execution.faults import raise_faults
from dora_convert.execution.lanes import Buffers, PerThread
from dora_convert.execution.memory import trim
from dora_convert.execution.threads import in_threads
from dora_convert.execution.update import Update, open_update
from dora_convert.maths.compare import relative
from dora_convert.maths.deltas import LowRank, nothing
from dora_convert.maths.dora import RowFaults
from dora_convert.maths.krylov import krylov_factors, spans_everything
from dora_convert.maths.lowrank import Factors, Flipped, Operator, exact_factors
from dora_convert.maths.weighting import Weight, Weighted, unweighted
from dora_convert.storage.reader import Reader

__all__ = ["Part", "Search", "Spectrum", "Weights", "project", "residuals"]

Part = tuple[TensorRef, Piece]
# How a module is weighted, and whether its weight is stored `[in, out]`; None: not at all.
Weights = Callable[[str], tuple[Weight, bool] | None]
_ENERGIES = (0.90, 0.95, 0.99)
_TRIMMED = 8  # modules: after each it would cost a twentieth of the time


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What each factor holds of one module's update T, as many as were computed, float64.

    `square` is ||T||² and `by_magnitude` ||T - D||². Where inputs are weighted, `weighted` are the
    singular values of T L and `weighted_square` is ||T L||²; they decide on ranks, and `singular`
    is what the same factors hold of T. Without, `singular` are T's singular values, falling.
    """

    path: str
    shape: tuple[int, int]
    singular: Tensor
    square: float
    by_magnitude: float
    weighted: Tensor | None = None
    weighted_square: float = 0.0

    @property
    def deciding(self) -> Tensor:
        """The falling values that ranks are chosen by."""
        return self.singular if self.weighted is None else self.weighted

    def weighted_residual(self, rank: int) -> float | None:
        """||(T - P) L|| / ||T L||, None where nothing is weighted."""
        return (
            None if self.weighted is None else _missed(self.weighted[:rank], self.weighted_square)
        )

    def residual(self, rank: int) -> float:
        """||T - T_rank|| / ||T||, exact: what the kept singular values do not hold."""
        return _missed(self.singular[:rank], self.square)

    def least_rank(self, energy: float) -> int | None:
        """The least rank that keeps this share of ||T||², or of ||T L||² where inputs are weighted.

        None where not enough was computed.
        """
        square = self.square if self.weighted is None else self.weighted_square
        if not square:
            return 0
        kept = self.deciding.square().cumsum(0)
        # A hair less: at full rank the sum misses ||T||² by its last bits.
        reached = kept >= energy * square * (1 - 1e-9)
        return int(reached.int().argmax()) + 1 if bool(reached.any()) else None

    def report(self, rank: int) -> LoraModule:
        """The module's line in a report."""
        first, second, third = (self.least_rank(energy) for energy in _ENERGIES)
        return LoraModule(
            path=self.path,
            rank=min(rank, len(self.singular)),
            residual=self.residual(rank),
            without_magnitude=relative(self.by_magnitude, self.square),
            energies=(first, second, third),
            update=math.sqrt(self.square),
            weighted_residual=self.weighted_residual(rank),
            weighted_update=math.sqrt(self.weighted_square),
        )


def _missed(values: Tensor, square: float) -> float:
    if not square:
        return 0.0
    return math.sqrt(max(0.0, 1 - float(values.square().sum()) / square))


@dataclass(frozen=True, slots=True)
class Search:
    """How factors are found: `exact`ly, or from random vectors of a `seed`; `weights` of inputs."""

    exact: bool = False
    seed: int = 0
    weights: Weights | None = None


_PLAIN = Search()


@dataclass(frozen=True, slots=True)
class _How:
    exact: bool
    generator: torch.Generator
    weighting: tuple[Weight, bool] | None


class _Stacked:
    """Modules that the checkpoint stores in several tensors, one below the other."""

    def __init__(self, parts: Sequence[Update]) -> None:
        self.parts = parts

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def times(self, x: Tensor) -> Tensor:
        return torch.cat([part.times(x) for part in self.parts])

    def transposed_times(self, y: Tensor) -> Tensor:
        cuts = torch.split(y, [part.shape[0] for part in self.parts])
        products = [part.transposed_times(cut) for part, cut in zip(self.parts, cuts, strict=True)]
        return torch.stack(products).sum(dim=0)

    def round_trip(self, x: Tensor) -> tuple[Tensor, Tensor]:
        images, returned = zip(*[part.round_trip(x) for part in self.parts], strict=True)
        return torch.cat(images), torch.stack(returned).sum(dim=0)


def project(
    modules: Mapping[str, Sequence[Part]],
    choice: RankChoice,
    keep: Callable[[str, Factors], None],
    *,
    workers: int,
    search: Search = _PLAIN,
    lanes: Callable[[], Buffers] = Buffers,
) -> dict[str, Spectrum]:
    """Approximate every module's update, with as many factors as `choice` can need.

    `keep` is handed the factors of each as they come, from several threads, so that no more are
    in memory than are worked on. `lanes` makes the buffers of each worker, and with them says on
    which device products are computed. Raises MismatchError for updates not defined everywhere.
    """
    reader = open_reader()
    found: dict[str, Spectrum] = {}
    faults: dict[str, RowFaults] = {}

    buffers = PerThread(lanes)

    def approximated(
        path: str, parts: Sequence[Part], own: Buffers
    ) -> tuple[Factors, Spectrum] | RowFaults:
        with _opened(parts, reader, own) as updates:
            fault = sum((update.faults for update in updates), RowFaults())
            if fault:
                return fault
            # By path, so that neither order nor threads change what a module gets.
            generator = torch.Generator().manual_seed(search.seed ^ zlib.crc32(path.encode()))
            weights = search.weights
            how = _How(search.exact, generator, None if weights is None else weights(path))
            return _approximate(path, updates, choice, how)

    def work(item: tuple[str, Sequence[Part]]) -> None:
        path, parts = item
        made = buffers.use(lambda own: approximated(path, parts, own))
        if isinstance(made, RowFaults):
            faults[path] = made
            return
        factors, found[path] = made
        keep(path, factors)
        if len(found) % _TRIMMED == 0:
            trim()

    # The largest first: none is left to one worker alone in the end.
    in_threads(sorted(modules.items(), key=lambda item: -_size(item[1])), work, workers)
    raise_faults(faults, "the update is not defined everywhere")
    return {path: found[path] for path in modules}


def _size(parts: Sequence[Part]) -> int:
    return sum((piece.stop - piece.start) * base.spec.row_bytes for base, piece in parts)


def _approximate(
    path: str,
    updates: Sequence[Update],
    choice: RankChoice,
    how: _How,
) -> tuple[Factors, Spectrum]:
    if how.weighting is not None:
        return _approximate_weighted(path, updates, choice, how, *how.weighting)
    operator: Operator = updates[0] if len(updates) == 1 else _Stacked(updates)
    square = sum(update.square for update in updates)
    by_magnitude = sum(update.by_magnitude for update in updates)
    limit = min(*operator.shape, choice.rank if choice.rank is not None else choice.ceiling)

    def spectrum(factors: Factors, whole: float | None) -> Spectrum:
        held = square if whole is None else whole
        return Spectrum(path, operator.shape, factors.singular, held, by_magnitude)

    likely = _inputs(updates, is_flipped=False)
    return _searched(operator, square, choice, limit, how, spectrum, likely)


def _approximate_weighted(
    path: str,
    updates: Sequence[Update],
    choice: RankChoice,
    how: _How,
    weight: Weight,
    is_flipped: bool,
) -> tuple[Factors, Spectrum]:
    """As above for T L; a weight stored `[in, out]` is turned to the layer's sense and back."""
    stored: Operator = updates[0] if len(updates) == 1 else _Stacked(updates)
    operator = Flipped(stored) if is_flipped else stored
    seen = weight.square(operator, _columns(updates, is_flipped=is_flipped))
    limit = min(*operator.shape, choice.rank if choice.rank is not None else choice.ceiling)

    def spectrum(factors: Factors, whole: float | None) -> Spectrum:
        return Spectrum(
            path,
            stored.shape,
            factors.singular,
            sum(update.square for update in updates),
            sum(update.by_magnitude for update in updates),
            weighted=factors.singular,
            weighted_square=seen if whole is None else whole,
        )

    likely = weight.transposed_times(_inputs(updates, is_flipped=is_flipped).double())
    weighted = Weighted(operator, weight.to(updates[0].buffers.device))
    found, figures = _searched(weighted, seen, choice, limit, how, spectrum, likely)
    factors = unweighted(operator, found.left)
    figures = replace(figures, singular=factors.singular)
    return factors.transposed() if is_flipped else factors, figures


@dataclass(frozen=True, slots=True)
class _Missed:
    """`T - left @ right` as an operator."""

    operator: Operator
    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape

    def times(self, x: Tensor) -> Tensor:
        return self.operator.times(x).double() - self.left @ (self.right @ x.double())

    def transposed_times(self, y: Tensor) -> Tensor:
        low_rank = self.right.T @ (self.left.T @ y.double())
        return self.operator.transposed_times(y).double() - low_rank


@contextmanager
def _opened(parts: Sequence[Part], reader: Reader, buffers: Buffers) -> Iterator[list[Update]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(open_update(*part, reader, buffers, slot))
            for slot, part in enumerate(parts)
        ]


def residuals(
    parts: Sequence[Part], left: Tensor, right: Tensor, weighting: tuple[Weight, bool] | None
) -> tuple[float, float | None]:
    """What any `left @ right` misses of the stored weight's update, plain and weighted.

    As `LoraModule` has them; `weighting` is what `Weights` gives for the module.
    """
    reader = open_reader()
    weight, is_flipped = (None, False) if weighting is None else weighting
    with _opened(parts, reader, Buffers()) as updates:
        stored: Operator = updates[0] if len(updates) == 1 else _Stacked(updates)
        operator = Flipped(stored) if is_flipped else stored
        columns = _columns(updates, is_flipped=is_flipped)
        left, right = (right.T, left.T) if is_flipped else (left, right)
        left, right = left.double(), right.double()
        # ||t - p||² of every column, from one product with T.
        crossed = (operator.transposed_times(left).double() * right.T).sum(dim=1)
        rest = columns - 2 * crossed + ((left.T @ left @ right) * right).sum(dim=0)
        rest = rest.clamp_min(0)
        plain = relative(float(rest.sum()), float(columns.sum()))
        if weight is None:
            return plain, None
        missed = weight.square(_Missed(operator, left, right), rest)
        return plain, relative(missed, weight.square(operator, columns))


def _columns(updates: Sequence[Update], *, is_flipped: bool) -> Tensor:
    """The squared norms of T's columns, in the layer's sense."""
    if is_flipped:
        return torch.cat([update.row_squares for update in updates])
    return torch.stack([update.column_squares for update in updates]).sum(dim=0)


def _inputs(updates: Sequence[Update], *, is_flipped: bool) -> Tensor:
    """`[in, k]`, in the layer's sense: the inputs that low-rank parts of T see; k may be 0."""
    pairs = [
        update.delta if isinstance(update.delta, LowRank) else nothing(*update.shape, update.dtype)
        for update in updates
    ]
    if is_flipped:
        blocks: Tensor = torch.block_diag(*(p.up for p in pairs))  # type: ignore[no-untyped-call]
        return blocks.cpu()
    return torch.cat([pair.down for pair in pairs]).T.cpu()


def _searched(
    operator: Operator,
    square: float,
    choice: RankChoice,
    limit: int,
    how: _How,
    spectrum: Callable[[Factors, float | None], Spectrum],
    likely: Tensor,
) -> tuple[Factors, Spectrum]:
    """Factors enough for the choice, of an operator with this ||operator||².

    `spectrum` is told that of the factors instead where all were computed.
    """
    # An open-ended choice starts small and doubles: most modules need little.
    rank = limit if choice.share is None else min(32, limit)
    while True:
        total = None
        if how.exact or spans_everything(operator.shape, rank):
            whole = exact_factors(operator)
            # Of the same products as its parts, so that all of them together leave exactly 0.
            total = float(whole.singular.square().sum())
            rank, factors = limit, whole.truncated(limit)
        else:
            factors = krylov_factors(operator, rank, how.generator, square, likely)
        figures = spectrum(factors, total)
        enough = choice.share is None or figures.least_rank(choice.share) is not None
        if rank >= limit or enough:
            return factors, figures
        rank = min(2 * rank, limit)
