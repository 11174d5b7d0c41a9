"""A plain LoRA to be made: how large, for whom, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from dora_convert.core.adapter import LayerKind

__all__ = [
    "DEFAULT_RANK",
    "FitReport",
    "LoraLayer",
    "LoraModule",
    "LoraReport",
    "RankChoice",
    "StatsReport",
]

DEFAULT_RANK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChoice:
    """How ranks are chosen; exactly one of the four is set.

    `rank`: the same for all modules. `energy`: the least rank that keeps this share of ||T||².
    `max_residual`: the least rank whose relative residual is no larger. `budget`: bytes for all
    pairs together, spent on one rank for all, or where it gains most if ranks may differ.
    `ceiling` bounds the last three.
    """

    rank: int | None = None
    energy: float | None = None
    max_residual: float | None = None
    budget: int | None = None
    ceiling: int = 512

    @property
    def share(self) -> float | None:
        """The share of ||T||² to keep, where that is what decides."""
        return self.energy if self.max_residual is None else 1 - self.max_residual**2


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One pair of factors. `shape` is the layer's `[out, in]`; `kernel` a convolution's.

    `flipped`: the stored weight is the transpose of the layer's. `empty`: a pair of zeros, for a
    layer that the adapter does not touch but the stack wants to see.
    """

    path: str
    kind: LayerKind
    shape: tuple[int, int]
    kernel: tuple[int, ...] = ()
    flipped: bool = False
    empty: bool = False


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module: residuals are ||T - BA|| / ||T||, Frobenius.

    `without_magnitude`: what the trained factors alone, the magnitude dropped, would leave.
    `energies`: the least ranks that keep 90, 95 and 99 % of ||T||², None where more than was
    computed. `update`: ||T||, for pooling. `weighted_residual`: ||(T - BA) L|| / ||T L|| where
    inputs of second moment L L.T were weighted, None elsewhere; `energies` are of ||T L||² then,
    and `weighted_update` is ||T L||.
    """

    path: str
    rank: int
    residual: float
    without_magnitude: float
    energies: tuple[int | None, int | None, int | None]
    update: float
    weighted_residual: float | None = None
    weighted_update: float = 0.0


@dataclass(frozen=True, slots=True)
class FitReport:
    """Factors fitted to the model's outputs on `texts`, and judged on `held_out` others.

    `before` and `after` are ||H - H'|| / ||H'|| of the last hidden states H there, H' the DoRA's.
    `best_step` of all `steps` was kept; 0 is the start itself, where nothing did better.
    """

    texts: int
    held_out: int
    steps: int
    best_step: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class LoraReport:
    """A finished conversion. `rank` is the stored one, to which smaller ones are padded.

    `weighted_residual` is over the modules whose inputs were weighted, None if there are none.
    Residuals are of what was written: where factors were fitted (`fit`), larger than the least.
    `output` is None where there was nothing to do.
    """

    output: str | None
    adapter: str
    base: str | None
    stack: str
    rank: int
    nbytes: int
    residual: float
    without_magnitude: float
    weighted_residual: float | None
    fit: FitReport | None
    modules: tuple[LoraModule, ...]
    notes: tuple[str, ...]
    advice: str
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class StatsReport:
    """Statistics of inputs, collected: of how many modules, over how much text."""

    output: str
    base: str
    modules: int
    texts: int
    tokens: int
    nbytes: int
    seconds: float
