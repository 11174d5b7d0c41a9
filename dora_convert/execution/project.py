"""Effective updates to low-rank factors: several modules at once, the same for any thread count."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_convert.core.lora import LoraModule, RankChoice
from dora_convert.core.plan import Piece
from dora_convert.core.tensors import TensorRef
from dora_convert.execution.faults import raise_faults
from dora_convert.execution.kernels import Buffers
from dora_convert.execution.threads import in_threads
from dora_convert.execution.update import Update, open_update
from dora_convert.maths.dora import RowFaults
from dora_convert.maths.lowrank import (
    Factors,
    Operator,
    exact_factors,
    krylov_factors,
    spans_everything,
)
from dora_convert.storage.reader import Reader

__all__ = ["Part", "Spectrum", "project"]

Part = tuple[TensorRef, Piece]
_ENERGIES = (0.90, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one module's update, as many as were computed, float64 and falling.

    `square` is ||T||² and `by_magnitude` ||T - D||².
    """

    path: str
    shape: tuple[int, int]
    singular: Tensor
    square: float
    by_magnitude: float

    def residual(self, rank: int) -> float:
        """||T - T_rank|| / ||T||, exact: what the kept singular values do not hold."""
        if not self.square:
            return 0.0
        kept = float(self.singular[:rank].square().sum())
        return math.sqrt(max(0.0, 1 - kept / self.square))

    def least_rank(self, energy: float) -> int | None:
        """The least rank that keeps this share of ||T||², None where not enough was computed."""
        if not self.square:
            return 0
        kept = self.singular.square().cumsum(0)
        # A hair less: at full rank the sum misses ||T||² by its last bits.
        reached = kept >= energy * self.square * (1 - 1e-9)
        return int(reached.int().argmax()) + 1 if bool(reached.any()) else None

    def report(self, rank: int) -> LoraModule:
        """The module's line in a report."""
        first, second, third = (self.least_rank(energy) for energy in _ENERGIES)
        return LoraModule(
            path=self.path,
            rank=min(rank, len(self.singular)),
            residual=self.residual(rank),
            without_magnitude=math.sqrt(self.by_magnitude / self.square) if self.square else 0.0,
            energies=(first, second, third),
            update=math.sqrt(self.square),
        )


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


def project(
    modules: Mapping[str, Sequence[Part]],
    choice: RankChoice,
    keep: Callable[[str, Factors], None],
    *,
    workers: int,
    exact: bool = False,
    seed: int = 0,
) -> dict[str, Spectrum]:
    """Approximate every module's update, with as many factors as `choice` can need.

    `keep` is handed the factors of each as they come, from several threads, so that no more are
    in memory than are worked on. Raises MismatchError for updates not defined everywhere.
    """
    reader = Reader()
    found: dict[str, Spectrum] = {}
    faults: dict[str, RowFaults] = {}

    def work(item: tuple[str, Sequence[Part]]) -> None:
        path, parts = item
        buffers = Buffers()
        with ExitStack() as stack:
            updates = [
                stack.enter_context(open_update(base, piece, reader, buffers))
                for base, piece in parts
            ]
            fault = sum((update.faults for update in updates), RowFaults())
            if fault:
                faults[path] = fault
                return
            # By path, so that neither order nor threads change what a module gets.
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(path.encode()))
            factors, found[path] = _approximate(path, updates, choice, exact, generator)
        keep(path, factors)

    in_threads(list(modules.items()), work, workers)
    raise_faults(faults, "the update is not defined everywhere")
    return {path: found[path] for path in modules}


def _approximate(
    path: str,
    updates: Sequence[Update],
    choice: RankChoice,
    exact: bool,
    generator: torch.Generator,
) -> tuple[Factors, Spectrum]:
    operator: Operator = updates[0] if len(updates) == 1 else _Stacked(updates)
    square = sum(update.square for update in updates)
    by_magnitude = sum(update.by_magnitude for update in updates)
    limit = min(*operator.shape, choice.rank if choice.rank is not None else choice.ceiling)
    # An open-ended choice starts small and doubles: most modules need little.
    rank = limit if choice.share is None else min(32, limit)
    while True:
        if exact or spans_everything(operator.shape, rank):
            whole = exact_factors(operator)
            # Of the same products as its parts, so that all of them together leave exactly 0.
            square = float(whole.singular.square().sum())
            rank, factors = limit, whole.truncated(limit)
        else:
            factors = krylov_factors(operator, rank, generator)
        spectrum = Spectrum(path, operator.shape, factors.singular, square, by_magnitude)
        enough = choice.share is None or spectrum.least_rank(choice.share) is not None
        if rank >= limit or enough:
            return factors, spectrum
        rank = min(2 * rank, limit)
