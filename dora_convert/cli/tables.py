"""Reports as tables for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from dora_convert.cli.console import size
from dora_convert.core.reports import Figures, Group, Inspection

__all__ = ["show_inspection"]


def show_inspection(report: Inspection) -> None:
    """The adapter in a few lines, its groups in a table, and with a base their figures."""
    # Piped output is for grep: do not fold it at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    print_line = console.out
    print_line(f"adapter    {report.adapter}")
    print_line(f"format     {report.format}, {report.kind}")
    print_line(f"trained on {report.base_model or 'not said'}")
    print_line(f"modules    {report.modules}, {size(report.nbytes)}")
    if report.replaced:
        shown = ", ".join(report.replaced[:4]) + (" ..." if len(report.replaced) > 4 else "")
        print_line(f"replaced   {len(report.replaced)} tensors trained whole: {shown}")
    if report.token_rows:
        print_line(f"tokens     {report.token_rows} rows trained whole")
    console.print(_groups(report.groups))
    if report.total is not None:
        print_line(f"against    {report.base}: fits")
        console.print(_figures(report.groups, report.total))


def _groups(groups: Iterable[Group]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("group")
    table.add_column("modules", justify="right")
    for title in ("kind", "rank", "scaling", "axis", "out x in", "dtype"):
        table.add_column(title)
    table.add_column("size", justify="right")
    for g in groups:
        table.add_row(
            g.name,
            str(g.modules),
            ", ".join(g.kinds),
            _range(g.ranks),
            _range(g.scalings),
            ", ".join(g.axes),
            _shapes(g.shapes),
            ", ".join(g.dtypes),
            size(g.nbytes),
        )
    return table


def _figures(groups: Iterable[Group], total: Figures) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("group")
    titles = ("|sBA|/|W|", "|W'-W|/|W|", "dM", "dD", "m/|W| spread", "rounding loss", "kept")
    for title in titles:
        table.add_column(title, justify="right")
    rows = [(g.name, g.figures) for g in groups if g.figures is not None]
    for name, f in (*rows, ("all", total)):
        table.add_row(
            name,
            f"{f.update:.2%}",
            f"{f.effect:.2%}",
            f"{f.magnitude_shift:.2%}",
            f"{f.direction_shift:.2e}",
            f"{f.magnitude_spread:.2%}",
            f"{f.rounding_loss:.2%}",
            f"{f.kept:.1%}",
        )
    table.caption = f"rounding to {total.stored_as}; dM and dD as in the paper, dM relative to |W|"
    table.caption_justify = "left"
    return table


def _range(values: tuple[float, ...]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:g}"
    return f"{values[0]:g} to {values[-1]:g}"


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    shown = ["x".join(map(str, shape)) for shape in shapes[:2]]
    return ", ".join(shown) + (" ..." if len(shapes) > 2 else "")
