"""What is drawn, and the files that it comes in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from dora_convert.core.pictures import FORMS, PICTURES, Cell, Curve, Shown
from dora_convert.core.reports import Figures
from dora_convert.errors import InputError
from dora_convert.report import pictures
from dora_convert.report.pictures import picture

NOTHING = Figures(0, 0, 0, 0, 0, 0, 0, 0, "bfloat16")
CELLS = (
    Cell("head", None, 1, replace(NOTHING, effect=0.5, magnitude_shift=0.03, direction_shift=4e-3)),
    *(
        Cell(
            group,
            layer,
            1,
            replace(
                NOTHING,
                effect=0.01 * (layer + 1) * times,
                magnitude_shift=0.001 * (layer + 2) * times,
                direction_shift=1e-3 * (layer + 3) / times,
            ),
        )
        for group, times in (("q_proj", 1), ("v_proj", 2))
        for layer in (0, 1, 4)
    ),
)
CURVES = (
    Curve(None, 4, (0.8, 0.4, 0.2, 0.1, 0.05), 0.3),
    Curve("q_proj", 2, (0.9, 0.5, 0.3, 0.2, 0.1), 0.4),
    Curve("v_proj", 2, (0.7, 0.3, 0.1, 0.05, 0.0), 0.1),
)
SHOWN: dict[str, Shown] = {"movement": CELLS, "layers": CELLS, "spectrum": CURVES}
OF = ("adapter me/dora", "base org/model")


def drawn(kind: str, shown: Shown | None = None) -> Figure:
    figure = Figure()
    pictures._DRAWN[kind][1](figure, SHOWN[kind] if shown is None else shown)
    return figure


def texts(kind: str, shown: Shown | None = None, of: tuple[str, ...] = OF) -> set[str]:
    """All that is written in the SVG."""
    tree = ElementTree.fromstring(picture(kind, shown or SHOWN[kind], of, "svg"))
    spans = tree.iter("{http://www.w3.org/2000/svg}text")
    return {"".join(span.itertext()) for span in spans}


def points(line: object) -> list[tuple[float, float]]:
    return [(pytest.approx(x), pytest.approx(y)) for x, y in line.get_xydata() if x == x]  # type: ignore[attr-defined]


def test_movement() -> None:
    both, magnitude, direction = drawn("movement").axes
    assert [line.get_label() for line in both.lines] == ["head", "q_proj", "v_proj"]
    assert points(both.lines[0]) == [(4, 3)]
    assert points(both.lines[2]) == [(1.5, 0.4), (2, 0.6), (3.5, 1.2)]
    assert points(magnitude.lines[0]) == []  # it is in no layer
    assert points(magnitude.lines[1]) == [(0, 0.2), (1, 0.3), (4, 0.6)]
    assert points(direction.lines[1]) == [(0, 3), (1, 4), (4, 7)]


def test_layers() -> None:
    axes, bar = drawn("layers").axes
    (image,) = axes.images
    values = image.get_array()
    assert values is not None
    assert values.filled(math.nan).tolist() == [
        [50, *[pytest.approx(math.nan, nan_ok=True)] * 3],
        [pytest.approx(math.nan, nan_ok=True), 1, 2, 5],
        [pytest.approx(math.nan, nan_ok=True), 2, 4, 10],
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-", "0", "1", "4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["head", "q_proj", "v_proj"]
    assert [text.get_text() for text in axes.texts] == ["50", "1", "2", "5", "2", "4", "10"]
    assert bar.get_ylabel() == "|W' - W| / |W|, %"


def test_layers_of_a_deep_model() -> None:
    cells = tuple(Cell("q_proj", layer, 1, NOTHING) for layer in range(3, 80))
    axes, _ = drawn("layers", cells).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [str(layer) for layer in range(5, 80, 5)]
    assert [int(tick) for tick in axes.get_xticks()] == [layer - 3 for layer in range(5, 80, 5)]
    assert not axes.texts


def test_spectrum() -> None:
    (axes,) = drawn("spectrum").axes
    total, first, _, dropped = axes.lines
    assert total.get_label() == "all modules"
    assert points(total) == [(1, 80), (2, 40), (3, 20), (4, 10), (5, 5)]
    assert first.get_label() == "q_proj"
    assert set(dropped.get_ydata()) == {30}
    # On the right: 1 - 0.8² of the square is kept where 80 % of the size are missed.
    assert pictures._energy(80) == pytest.approx(36)
    (right,) = axes.child_axes
    assert right.get_ylabel() == "share of |T|² kept, %"


def test_a_plain_lora_drops_no_magnitude() -> None:
    curve = Curve(None, 1, (0.0,), 0.0)
    (axes,) = drawn("spectrum", (curve, replace(curve, group="q_proj"))).axes
    assert len(axes.lines) == 2


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (
            "movement",
            {
                "change of direction ΔD, mean of 1 - cos(V, W), in 10⁻³",
                "change of magnitude ΔM, % of mean |W|",
                "ΔD, in 10⁻³",
                "ΔM, % of mean |W|",
                "layer",
            },
        ),
        ("layers", {"layer", "|W' - W| / |W|, %"}),
        (
            "spectrum",
            {
                "rank of the LoRA",
                "|T - LoRA| / |T|, T = W' - W, %",
                "share of |T|² kept, %",
                "all modules",
                "16",
            },
        ),
    ],
)
def test_an_svg_says_what_it_shows(kind: str, labels: set[str]) -> None:
    shown = SHOWN[kind]
    if kind == "spectrum":
        shown = (Curve(None, 4, (0.5,) * 16, 0.3), Curve("q_proj", 4, (0.5,) * 16, 0.3))
    found = texts(kind, shown)
    assert labels <= found
    assert {*OF, "q_proj"} <= found
    assert pictures._DRAWN[kind][0] in found


@pytest.mark.parametrize("kind", PICTURES)
def test_files(kind: str) -> None:
    png = picture(kind, SHOWN[kind], OF, "png")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">2I", png[16:24])
    assert 800 < width < 2000
    assert 400 < height < 1000
    assert png[-8:-4] == b"IEND"
    pdf = picture(kind, SHOWN[kind], OF, "pdf")
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")


def hashes() -> list[str]:
    """Of each kind in one form, and each form of one kind."""
    return [
        hashlib.sha256(picture(kind, SHOWN[kind], OF, form)).hexdigest()
        for kind, form in zip(PICTURES, FORMS, strict=True)
    ]


def test_the_same_bytes_in_another_process_and_under_other_settings(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nlines.linewidth: 9\nsvg.hashsalt: x\n")
    code = """
import json, sys
from tests.report.test_pictures import hashes
print(json.dumps([hashes(), "matplotlib.pyplot" in sys.modules]))
"""
    settings = {"MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | settings,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [hashes(), False]


def test_settings_of_the_process_are_left_alone() -> None:
    import matplotlib as mpl  # noqa: PLC0415

    before = dict(mpl.rcParams)
    picture("layers", CELLS, OF, "svg")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("kind", PICTURES)
def test_names_that_no_one_would_choose(kind: str) -> None:
    """Formulas, hidden labels, control and unpaired characters, another script, length."""
    names = ["$\\frac{$", "_hidden", "a\x00\x1b[31mb", "\ud800", "模型", "<&>\"'", "n" * 500]
    cells = tuple(Cell(name, i, 1, NOTHING) for i, name in enumerate(names))
    curves = (CURVES[0], *(replace(CURVES[1], group=name) for name in names))
    shown: Shown = curves if kind == "spectrum" else cells
    found = texts(kind, shown, of=("adapter \x07$x$",))
    assert {"adapter \\x07$x$", "$\\frac{$", "a\\x00\\x1b[31mb", "\\ud800", "模型"} <= found
    assert "_hidden" in {text.strip() for text in found}
    assert "..." + "n" * 57 in found
    assert "<&>\"'" in found
    for form in ("png", "pdf"):
        assert picture(kind, shown, ("adapter \x07$x$",), form)


def test_a_legend_of_very_many_groups_shows_the_first() -> None:
    cells = tuple(Cell(f"group{i}", 0, 1, NOTHING) for i in range(100))
    found = texts("movement", cells)
    assert "28 of 100 groups" in found
    assert "group27" in found
    assert "group28" not in found


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"a picture needs matplotlib\.figure") as caught:
        picture("layers", CELLS, OF, "svg")
    assert caught.value.hint == 'pip install "dora-convert[plot]"'
