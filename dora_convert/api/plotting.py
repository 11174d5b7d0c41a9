"""`plot`: pictures of what an adapter does to its base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.measuring import Match, Measures, matched, measured
from dora_convert.api.merging import Silent
from dora_convert.api.progressing import Work
from dora_convert.api.reading import ReadOptions, named_base, read_adapter, worker_count
from dora_convert.core.extras import required
from dora_convert.core.lora import DEFAULT_RANK, RankChoice
from dora_convert.core.pictures import FORMS, PICTURES, Cell, Curve, PlotReport, Shown
from dora_convert.errors import InputError, UnknownNameError
from dora_convert.planning.lora import targets
from dora_convert.report.places import Place, places
from dora_convert.storage.single import check_file, whole_file
from dora_convert.storage.sparse import released

if TYPE_CHECKING:
    from dora_convert.core.protocols import Listener
    from dora_convert.execution.project import Spectrum

__all__ = ["PlotOptions", "cells", "check_picture", "plot", "save_picture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotOptions:
    """What to draw: `kind` is a key of `PICTURES`; `max_rank` is where a spectrum ends."""

    kind: str = next(iter(PICTURES))
    max_rank: int = DEFAULT_RANK
    workers: int | None = None
    overwrite: bool = False


@released()
def plot(
    adapter: Path,
    output: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    how: PlotOptions | None = None,
    listener: Listener | None = None,
) -> PlotReport:
    """Draw what the adapter does to its base, by default the one that it names.

    The end of the file's name says what kind of file it is, one of `FORMS`; the same numbers give
    the same bytes. Raises InputError (also where matplotlib is missing), MismatchError and
    OutputError.
    """
    options, how = options or ReadOptions(), how or PlotOptions()
    if how.kind not in PICTURES:
        raise UnknownNameError("picture", how.kind, list(PICTURES), [])
    if how.max_rank < 1:
        raise InputError("a rank is 1 or more")
    check_picture(output, overwrite=how.overwrite)
    found = read_adapter(adapter, options)
    match = matched(found, adapter, base or named_base(found), options)
    notes = [*match.adapter.notes, *match.notes]
    shown: Shown
    if how.kind == "spectrum":
        shown = _curves(match, how, listener or Silent())
    else:
        measures = measured(match.plan, how.workers)
        notes += measures.notes
        shown = cells(measures)
    save_picture(output, how.kind, shown, adapter, match.base)
    return PlotReport(
        output=str(output),
        adapter=str(adapter),
        base=match.base,
        kind=how.kind,
        nbytes=output.stat().st_size,
        shown=shown,
        notes=tuple(notes),
    )


def check_picture(output: Path, *, overwrite: bool) -> None:
    """Raise InputError and OutputError for a picture that could not be made, before the work."""
    if _form(output) not in FORMS:
        known = ", ".join(f".{form}" for form in FORMS)
        raise InputError(
            f"{output.name or output} does not say what kind of file it is to be",
            where=str(output),
            hint=f"Let its name end in one of {known}.",
        )
    required("matplotlib", "plot", "a picture")
    check_file(output, overwrite=overwrite)


def save_picture(output: Path, kind: str, shown: Shown, adapter: Path, base: str) -> None:
    """Draw it, and write the file at once. Raises OutputError."""
    from dora_convert.report.pictures import picture

    of = f"adapter {_called(str(adapter))}", f"base {_called(base)}"
    drawn = picture(kind, shown, of, _form(output))
    with whole_file(output) as file:
        file.write_bytes(drawn)


def _form(output: Path) -> str:
    return output.suffix.lower().removeprefix(".")


def _called(name: str) -> str:
    """Without the folders above it, or most of a commit: they say little of the model."""
    path = Path(name)
    if path.exists():
        return path.name or path.resolve().name
    return re.sub(r"(@[0-9a-f]{10})[0-9a-f]{30}$", r"\1", name)


def cells(measures: Measures) -> tuple[Cell, ...]:
    """Figures by group and layer, sorted."""
    return tuple(
        Cell(place.group, place.layer, len(paths), measures.figures(paths))
        for place, paths in _by_place(measures.sums).items()
    )


def _by_place(paths: Iterable[str]) -> dict[Place, list[str]]:
    """Module paths of each place; groups sorted, layers rising, what is in none of them first."""
    found: dict[Place, list[str]] = {}
    for path, place in places(paths).items():
        found.setdefault(place, []).append(path)
    order = sorted(found, key=lambda p: (p.group, -1 if p.layer is None else p.layer))
    return {place: found[place] for place in order}


def _curves(match: Match, how: PlotOptions, listener: Listener) -> tuple[Curve, ...]:
    """All modules together, then every group."""
    from dora_convert.execution.project import project

    parts = targets(match.plan)
    work = Work(parts, listener, 0)
    spectra = project(
        parts,
        RankChoice(rank=how.max_rank),
        work.watched(lambda _path, _factors: None),
        workers=worker_count(how.workers),
    )
    return _pooled(spectra, how.max_rank)


def _pooled(spectra: Mapping[str, Spectrum], ranks: int) -> tuple[Curve, ...]:
    groups: dict[str, list[Spectrum]] = {}
    for place, paths in _by_place(spectra).items():
        groups.setdefault(place.group, []).extend(spectra[path] for path in paths)
    together = [(None, list(spectra.values())), *groups.items()]
    return tuple(_curve(group, members, ranks) for group, members in together)


def _curve(group: str | None, spectra: list[Spectrum], ranks: int) -> Curve:
    whole = sum(spectrum.square for spectrum in spectra)
    left = [sum(squares) for squares in zip(*(_left(s, ranks) for s in spectra), strict=True)]

    def share(square: float) -> float:
        return math.sqrt(square / whole) if whole else 0.0

    return Curve(
        group=group,
        modules=len(spectra),
        missed=tuple(map(share, left)),
        without_magnitude=share(sum(spectrum.by_magnitude for spectrum in spectra)),
    )


def _left(spectrum: Spectrum, ranks: int) -> list[float]:
    """||T - T_r||² at r = 1, 2, ...; from full rank on as there."""
    kept = spectrum.singular.square().cumsum(0).tolist()[:ranks]
    left = [max(0.0, spectrum.square - square) for square in kept]
    return left + left[-1:] * (ranks - len(left))
