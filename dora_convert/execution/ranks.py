"""Spectra to ranks."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from dora_convert.core.lora import RankChoice
from dora_convert.execution.project import Spectrum

__all__ = ["choose_ranks"]


def choose_ranks(
    spectra: Mapping[str, Spectrum], choice: RankChoice, *, element_bytes: int
) -> dict[str, int]:
    """The rank of every module. `element_bytes` prices a budget."""
    if choice.budget is not None:
        return _spend(spectra, choice.budget // element_bytes)
    ranks = {}
    for path, spectrum in spectra.items():
        computed = len(spectrum.deciding)
        needed = choice.rank if choice.share is None else spectrum.least_rank(choice.share)
        ranks[path] = computed if needed is None else min(needed, computed)
    return ranks


def _spend(spectra: Mapping[str, Spectrum], elements: int) -> dict[str, int]:
    """Take the singular value with the largest square per parameter, until the budget is spent.

    A rank of a module costs `out + in` elements whatever its number, and its singular values
    fall, so the greedy choice is optimal up to the last one that does not fit. Every module has
    rank 1 from the start: a pair of rank 0 cannot be stored.
    """
    ranks = {path: min(1, len(spectrum.deciding)) for path, spectrum in spectra.items()}
    elements -= sum(sum(spectrum.shape) for spectrum in spectra.values())
    queue: list[tuple[float, str, int]] = []
    for path, spectrum in spectra.items():
        cost = sum(spectrum.shape)
        if len(spectrum.deciding) > 1:
            heapq.heappush(queue, (-(float(spectrum.deciding[1]) ** 2) / cost, path, cost))
    while queue:
        _, path, cost = heapq.heappop(queue)
        if cost > elements:
            continue
        elements -= cost
        ranks[path] += 1
        singular = spectra[path].deciding
        if ranks[path] < len(singular):
            gain = float(singular[ranks[path]]) ** 2 / cost
            heapq.heappush(queue, (-gain, path, cost))
    return ranks
