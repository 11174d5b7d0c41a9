"""What pictures there are of an adapter on its base, and the numbers that they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dora_convert.core.reports import Figures

__all__ = ["FORMS", "PICTURES", "Cell", "Curve", "PlotReport", "Shown"]

PICTURES = {
    "movement": "how far magnitude and direction moved",
    "layers": "the size of the update by layer",
    "spectrum": "what a LoRA of each rank would miss",
}
FORMS = ("png", "svg", "pdf")  # of files, as their names end


@dataclass(frozen=True, slots=True)
class Cell:
    """The modules of one group in one layer, together. `layer` is None for those outside of all."""

    group: str
    layer: int | None
    modules: int
    figures: Figures


@dataclass(frozen=True, slots=True)
class Curve:
    """What the best LoRA misses of a group's update T, or of all modules' where `group` is None.

    `missed`: ||T - T_r|| / ||T|| at the ranks r = 1, 2, 3, ..., all modules at the same one.
    `without_magnitude`: ||T - D|| / ||T||, D the trained factors alone.
    """

    group: str | None
    modules: int
    missed: tuple[float, ...]
    without_magnitude: float


Shown: TypeAlias = tuple[Cell, ...] | tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class PlotReport:
    """A picture that was drawn, and the numbers in it. `kind` is a key of `PICTURES`."""

    output: str
    adapter: str
    base: str
    kind: str
    nbytes: int
    shown: Shown
    notes: tuple[str, ...]
