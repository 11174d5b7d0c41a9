"""A plain LoRA to be made: how large, for whom, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from dora_convert.core.adapter import LayerKind

__all__ = ["DEFAULT_RANK", "LoraLayer", "LoraModule", "LoraReport", "RankChoice"]

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
    computed. `update`: ||T||, for pooling.
    """

    path: str
    rank: int
    residual: float
    without_magnitude: float
    energies: tuple[int | None, int | None, int | None]
    update: float


@dataclass(frozen=True, slots=True)
class LoraReport:
    """A finished conversion. `rank` is the stored one, to which smaller ones are padded."""

    output: str
    adapter: str
    base: str
    stack: str
    rank: int
    nbytes: int
    residual: float
    without_magnitude: float
    modules: tuple[LoraModule, ...]
    notes: tuple[str, ...]
    advice: str
    seconds: dict[str, float]
