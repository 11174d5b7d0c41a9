"""Reports as text: a few lines, and columns that are as wide as they must be."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence

import click

from dora_convert.cli.console import printable, size
from dora_convert.core.reports import Figures, Group, Inspection

__all__ = ["columns", "show_inspection"]

_GAP = "  "
_LEAST = 22  # of a name on a narrow terminal: `...31.self_attn.q_proj` still tells the layer

_LEGEND = """\
update     |V - W| / |W|, V = W + scaling B A: the low-rank part, beside the base
effect     |W' - W| / |W|, W' = m V / |V|: all that the merge does
magnitude  mean |m - |W|| / mean |W| over the rows (the paper's delta M, made relative)
direction  mean of 1 - cos(V, W) over the rows (the paper's delta D)
spread     standard deviation of log(m / |W|): small where m sits on the base's norms
rounding   |Q(W') - W'| / |W' - W|: noise that rounding Q to {dtype} adds to the effect
kept       share of the effect that is still there after rounding"""


def show_inspection(report: Inspection) -> None:
    """The adapter in a few lines, its groups in a table, and with a base their figures."""
    for label, text in _facts(report):
        click.echo(f"{label:10} {printable(text)}")
    if report.groups:
        click.echo()
        _echo_table(*_groups(report.groups))
    if report.total is not None:
        click.echo()
        _echo_table(*_figures(report.groups, report.total))
        click.echo()
        click.echo(_LEGEND.format(dtype=report.total.stored_as))


def columns(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, width: int | None = None
) -> Iterator[str]:
    """Lines of a table. The first `left` columns are flush left, the others flush right.

    Where `width` is too little, the first column loses the beginning of its texts: of a module's
    path the end tells more.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    if width is not None:
        others = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
        widths[0] = min(widths[0], max(width - others, _LEAST))
    for row in (titles, *rows):
        cells = [_fitted(row[0], widths[0]), *row[1:]]
        padded = [
            cell.ljust(wide) if i < left else cell.rjust(wide)
            for i, (cell, wide) in enumerate(zip(cells, widths, strict=True))
        ]
        yield _GAP.join(padded).rstrip()


def _fitted(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _echo_table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    # Not shortened in a pipe: it is for grep there.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = columns(titles, rows, left=left, width=width)
    click.secho(next(lines), bold=True)
    for line in lines:
        click.echo(line)


def _facts(report: Inspection) -> Iterator[tuple[str, str]]:
    yield "adapter", report.adapter
    yield "format", f"{report.format}, {report.kind}"
    yield "trained on", report.base_model or "(the adapter does not say)"
    if report.base is not None:
        yield "base", f"{report.base} (fits)"
    yield "modules", f"{report.modules}, {size(report.nbytes)}"
    if report.replaced:
        shown = ", ".join(report.replaced[:4]) + (" ..." if len(report.replaced) > 4 else "")
        yield "replaced", f"{len(report.replaced)} tensors trained whole: {shown}"
    if report.token_rows:
        yield "tokens", f"{report.token_rows} rows of the embedding trained whole"


def _groups(groups: Sequence[Group]) -> tuple[Sequence[str], list[list[str]], int]:
    titles = ("group", "kind", "axis", "dtype", "out x in", "rank", "scaling", "modules", "size")
    rows = [
        [
            printable(g.name),
            ", ".join(g.kinds),
            ", ".join(g.axes),
            ", ".join(g.dtypes),
            _shapes(g.shapes),
            _range(g.ranks),
            _range(g.scalings),
            str(g.modules),
            size(g.nbytes),
        ]
        for g in groups
    ]
    return titles, rows, 5


def _figures(groups: Sequence[Group], total: Figures) -> tuple[Sequence[str], list[list[str]], int]:
    titles = ("group", "update", "effect", "magnitude", "direction", "spread", "rounding", "kept")
    named = [(printable(g.name), g.figures) for g in groups if g.figures is not None]
    rows = [
        [
            name,
            f"{f.update:.2%}",
            f"{f.effect:.2%}",
            f"{f.magnitude_shift:.2%}",
            f"{f.direction_shift:.2e}",
            f"{f.magnitude_spread:.2%}",
            f"{f.rounding_loss:.2%}",
            f"{f.kept:.1%}",
        ]
        for name, f in (*named, ("all", total))
    ]
    return titles, rows, 1


def _range(values: tuple[float, ...]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:g}"
    return f"{values[0]:g} to {values[-1]:g}"


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    shown = ["x".join(map(str, shape)) for shape in shapes[:2]]
    return ", ".join(shown) + (" ..." if len(shapes) > 2 else "")
