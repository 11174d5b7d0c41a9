"""Numbers drawn with matplotlib: the same ones give the same bytes, whatever a user has set up."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dora_convert.core.extras import required
from dora_convert.core.pictures import Cell, Curve, Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["picture"]

# Told apart by colour-blind people too (Okabe and Ito); yellow, which is faint on white, left out.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^DvPX"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dora-convert",  # names of parts are random without
    "text.parse_math": False,  # what comes from a file is no formula
}
_TIMELESS: Mapping[str, dict[str, None]] = {
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
    "png": {},
}
_NAMED = 28  # groups in a legend
_NUMBERED = 16  # columns of a heat map that has its numbers written into it
_OUTSIDE = -1  # of all layers
_ENERGIES = (0, 50, 80, 90, 95, 99)


def picture(kind: str, shown: Shown, of: Sequence[str], form: str) -> bytes:
    """The file. `of` are lines below the title; `kind` and `form` are of `PICTURES` and `FORMS`.

    Raises InputError where matplotlib is missing.
    """
    figures = required("matplotlib.figure", "plot", "a picture")
    style = required("matplotlib.style", "plot", "a picture")
    title, draw = _DRAWN[kind]
    file = io.BytesIO()
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font does not have is drawn as a box
        figure = figures.Figure(layout="constrained")
        draw(figure, shown)
        lines = "\n".join([title, *map(_plain, of)])
        figure.suptitle(lines, x=0.01, horizontalalignment="left", fontsize=10)
        figure.savefig(file, format=form, metadata=_TIMELESS[form])
    return file.getvalue()


def _movement(figure: Figure, shown: Sequence[Cell]) -> None:
    """Both changes against each other on the left, each along the layers on the right."""
    figure.set_size_inches(10, 4.8)
    axes = figure.subplot_mosaic([["both", "magnitude"], ["both", "direction"]])
    both, magnitude, direction = axes["both"], axes["magnitude"], axes["direction"]
    marks = _marks(cell.group for cell in shown)
    for group, look in marks.items():
        cells = [cell for cell in shown if cell.group == group]
        xs = [1000 * cell.figures.direction_shift for cell in cells]
        ys = [100 * cell.figures.magnitude_shift for cell in cells]
        both.plot(xs, ys, linestyle="none", **look)
        layers = [math.nan if cell.layer is None else cell.layer for cell in cells]
        magnitude.plot(layers, ys, linewidth=1, **look)
        direction.plot(layers, xs, linewidth=1, **look)
    both.set(xlim=(0, None), ylim=(0, None))
    both.set_xlabel("change of direction ΔD, mean of 1 - cos(V, W), in 10⁻³")
    both.set_ylabel("change of magnitude ΔM, % of mean |W|")
    magnitude.set(ylabel="ΔM, % of mean |W|", ylim=(0, None))
    direction.set(ylabel="ΔD, in 10⁻³", xlabel="layer", ylim=(0, None))
    for panel in (magnitude, direction):
        panel.locator_params(axis="x", integer=True)
    _legend(figure, both, marks)


def _layers(figure: Figure, shown: Sequence[Cell]) -> None:
    """A row for each group, a column for each layer, `-` for none; white without a module."""
    groups = list(dict.fromkeys(cell.group for cell in shown))
    layers = sorted({_column(cell) for cell in shown})
    values = {(cell.group, _column(cell)): 100 * cell.figures.effect for cell in shown}
    table = [[values.get((group, layer), math.nan) for layer in layers] for group in groups]
    top = max(values.values()) or 1
    few = len(layers) <= _NUMBERED
    width = 5 + (0.4 if few else 0.15) * len(layers)
    figure.set_size_inches(min(width, 24), min(2 + 0.3 * len(groups), 24))
    axes = figure.subplots()
    image = axes.imshow(table, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    axes.set_xlabel("layer")
    axes.set_yticks(range(len(groups)), [_plain(group) for group in groups])
    step = 1 if few else 5 * math.ceil(len(layers) / 120)
    ticks = {i: str(layer) for i, layer in enumerate(layers) if layer % step == 0}
    if layers[0] == _OUTSIDE:
        ticks[0] = "-"
    axes.set_xticks(list(ticks), list(ticks.values()))
    figure.colorbar(image, label="|W' - W| / |W|, %")
    if few:
        _write_numbers(axes, table, top)


def _column(cell: Cell) -> int:
    return _OUTSIDE if cell.layer is None else cell.layer


def _write_numbers(axes: Axes, table: Sequence[Sequence[float]], top: float) -> None:
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if math.isfinite(value):
                color = "white" if value < top / 2 else "black"
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", color=color, fontsize=7)


def _spectrum(figure: Figure, shown: Sequence[Curve]) -> None:
    """What is missed against the rank, down to where more rank stops to pay."""
    figure.set_size_inches(8.5, 4.8)
    axes = figure.subplots()
    total = next(curve for curve in shown if curve.group is None)
    ranks = len(total.missed)
    powers = [2**i for i in range(ranks.bit_length())]
    marks = _marks(curve.group for curve in shown if curve.group is not None)
    whole = {"color": "black", "marker": "o", "linewidth": 3, "label": "all modules"}
    for curve in shown:
        look = whole if curve.group is None else marks[curve.group]
        ys = [100 * share for share in curve.missed]
        axes.plot(range(1, ranks + 1), ys, markevery=[rank - 1 for rank in powers], **look)
    if total.without_magnitude:
        label = "the trained factors alone,\nmagnitude dropped"
        axes.axhline(100 * total.without_magnitude, color="gray", linestyle="--", label=label)
    axes.set(xscale="log", xlim=(0.95, 1.05 * ranks), ylim=(0, None))
    axes.set_xticks(powers, [str(power) for power in powers])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="rank of the LoRA", ylabel="|T - LoRA| / |T|, T = W' - W, %")
    axes.grid(alpha=0.3)
    energy = axes.secondary_yaxis("right", functions=(_energy, _missed))
    energy.set_yticks(_ENERGIES)
    energy.set_ylabel("share of |T|² kept, %")
    _legend(figure, axes, marks)


def _energy(missed: Any) -> Any:
    return 100 * (1 - (missed / 100) ** 2)


def _missed(energy: Any) -> Any:
    return 100 * (1 - energy / 100).clip(0) ** 0.5


def _marks(groups: Iterator[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each; where colours begin again, with other markers."""
    named = dict.fromkeys(groups)
    return {
        group: {
            "color": _COLORS[i % len(_COLORS)],
            "marker": _MARKERS[(i + i // len(_COLORS)) % len(_MARKERS)],
            "markersize": 4,
            "label": _plain(group),
        }
        for i, group in enumerate(named)
    }


def _legend(figure: Figure, axes: Axes, marks: Mapping[str, Any]) -> None:
    """Beside all; of very many groups the first."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    for look in list(marks.values())[_NAMED:]:
        named.pop(look["label"], None)
    title = f"{_NAMED} of {len(marks)} groups" if len(marks) > _NAMED else None
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, 1 + 0.18 * len(named)))
    figure.legend(named.values(), named.keys(), loc="outside right center", title=title)


def _plain(text: str) -> str:
    """A name from a file or of one, for a text that XML can hold and a legend does not hide."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    short = safe if len(safe) <= 60 else f"...{safe[-57:]}"
    return f" {short}" if short.startswith("_") else short


_DRAWN: Mapping[str, tuple[str, Callable[[Figure, Any], None]]] = {
    "movement": ("How far magnitude and direction moved", _movement),
    "layers": ("How large the update is, module by module", _layers),
    "spectrum": ("What the best LoRA of each rank misses of the update T", _spectrum),
}
