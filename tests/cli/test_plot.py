"""`plot`, and `inspect --plot`: numbers by the paper's formulas, files, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from dora_convert import api
from dora_convert.api.measuring import Measures
from dora_convert.api.plotting import cells, save_picture
from dora_convert.errors import InputError, UnknownNameError
from dora_convert.maths.compare import ModuleSums
from tests.cli.sandbox import ALPHA, MODULES, RANK, Result, Sandbox, digest

Plot = Callable[..., Result]


@pytest.fixture
def target(box: Sandbox) -> Path:
    return box.root / "picture.svg"


@pytest.fixture
def plot(box: Sandbox, target: Path) -> Plot:
    return lambda *options: box.run("plot", box.adapter, "-b", box.base, "-o", target, *options)


def parts(box: Sandbox, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """`W`, `V` and `m` in float64."""
    adapter = box.load_adapter()
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    a, b, m = (adapter[f"base_model.model.{path}.{name}"].double() for name in names)
    weight = box.load_base()[f"{path}.weight"].double()
    return weight, weight + ALPHA / RANK * b @ a, m


def update(box: Sandbox, path: str) -> Tensor:
    weight, direction, m = parts(box, path)
    return m[:, None] * direction / direction.norm(dim=1, keepdim=True) - weight


def by_place(report: Any) -> dict[tuple[str, int], Any]:
    return {(cell["group"], cell["layer"]): cell for cell in report["shown"]}


def written(file: Path) -> set[str]:
    texts = ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(text.itertext()) for text in texts}


@pytest.mark.parametrize("kind", ["movement", "layers"])
def test_numbers_of_the_paper(plot: Plot, box: Sandbox, target: Path, kind: str) -> None:
    """ΔM and ΔD as arXiv 2402.09353, section 3.2, has them; ΔM relative to the mean magnitude."""
    result = plot("--kind", kind, "--json")
    assert (result.code, result.err) == (0, "")
    report = result.json
    assert report["schema"] == "dora-convert/plot/1"
    assert report["kind"] == kind
    assert report["output"] == str(target)
    assert report["nbytes"] == target.stat().st_size
    found = by_place(report)
    assert list(found) == [("q_proj", 0), ("q_proj", 1), ("v_proj", 0), ("v_proj", 1)]
    for path in MODULES:
        weight, direction, m = parts(box, path)
        cell = found[path.rpartition(".")[2], int(path.split(".")[2])]
        assert cell["modules"] == 1
        k = len(m)
        before = weight.norm(dim=1)
        delta_m = (m - before).abs().sum() / k
        cosine = torch.nn.functional.cosine_similarity(direction, weight, dim=1)
        delta_d = (1 - cosine).sum() / k
        figures = cell["figures"]
        assert figures["magnitude_shift"] == pytest.approx(float(delta_m / before.mean()), rel=1e-9)
        assert figures["direction_shift"] == pytest.approx(float(delta_d), rel=1e-9)
        effect = update(box, path).norm() / weight.norm()
        assert figures["effect"] == pytest.approx(float(effect), rel=1e-9)


def test_the_spectrum_is_that_of_the_update(plot: Plot, box: Sandbox) -> None:
    result = plot("--kind", "spectrum", "--max-rank", 20, "--json")
    assert (result.code, result.err) == (0, "")
    curves = {curve["group"]: curve for curve in result.json["shown"]}
    assert list(curves) == [None, "q_proj", "v_proj"]
    for group, curve in curves.items():
        paths = [path for path in MODULES if group is None or path.endswith(group)]
        updates = [update(box, path) for path in paths]
        assert curve["modules"] == len(paths)
        whole = sum(float(t.square().sum()) for t in updates)
        values = [torch.linalg.svdvals(t).square() for t in updates]
        missed = [sum(float(v[rank:].sum()) for v in values) / whole for rank in range(1, 21)]
        # v_proj has 16 rows: nothing is left of it from there on.
        assert curve["missed"] == pytest.approx([m**0.5 for m in missed], rel=1e-5, abs=1e-6)
        dropped = sum(
            float((t - (parts(box, p)[1] - parts(box, p)[0])).square().sum())
            for t, p in zip(updates, paths, strict=True)
        )
        assert curve["without_magnitude"] == pytest.approx((dropped / whole) ** 0.5, rel=1e-6)


def test_modules_of_one_cell_are_taken_together() -> None:
    sums = {
        "layers.0.experts.0.w1": ModuleSums(rows=1, base=1.0, effect=0.25, direction_shift=0.4),
        "layers.0.experts.1.w1": ModuleSums(rows=3, base=3.0, effect=0.75, direction_shift=0.8),
        "head": ModuleSums(rows=1, base=4.0, effect=1.0),
    }
    head, experts = cells(Measures(sums, "bfloat16"))
    assert (head.group, head.layer, head.modules, head.figures.effect) == ("head", None, 1, 0.5)
    assert (experts.group, experts.layer, experts.modules) == ("w1", 0, 2)
    assert experts.figures.effect == pytest.approx((1.0 / 4.0) ** 0.5)
    assert experts.figures.direction_shift == pytest.approx(1.2 / 4)


@pytest.mark.parametrize("kind", ["movement", "layers", "spectrum"])
def test_a_picture(plot: Plot, box: Sandbox, target: Path, kind: str) -> None:
    before = digest(box.base, box.adapter)
    result = plot("--kind", kind)
    assert (result.code, result.out, result.err) == (0, f"{target}\n", "")
    # Called by the names of their folders alone, wherever those are.
    assert {"adapter adapter", "base base", "q_proj", "v_proj"} <= written(target)
    assert str(box.root) not in target.read_text()
    assert sorted(path.name for path in box.root.iterdir()) == ["adapter", "base", "picture.svg"]
    assert digest(box.base, box.adapter) == before
    # The same bytes again, by any number of threads.
    first = digest(target)
    for workers in (1, 3):
        assert plot("--kind", kind, "--overwrite", "--workers", workers).code == 0
        assert digest(target) == first


@pytest.mark.parametrize("name", ["a.png", "A.PNG", "a.b.pdf"])
def test_the_name_decides(box: Sandbox, name: str) -> None:
    file = box.root / name
    assert box.run("plot", box.adapter, "-b", box.base, "-o", file).code == 0
    assert file.read_bytes()[:4] == (b"%PDF" if "pdf" in name else b"\x89PNG")


def test_a_base_that_the_adapter_names(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(box.root)
    box.configure(box.adapter, base_model_name_or_path="base")
    assert box.run("plot", "adapter", "-o", "p.svg").out == "p.svg\n"
    monkeypatch.chdir(box.adapter)
    assert box.run("plot", ".", "-b", "../base", "-o", "../q.svg").code == 0
    assert digest(box.root / "p.svg").popitem()[1] == digest(box.root / "q.svg").popitem()[1]


@pytest.mark.usefixtures("offline")
def test_no_base(box: Sandbox, target: Path) -> None:
    box.refuses(6, "someone/some-model", run=lambda: box.run("plot", box.adapter, "-o", target))
    box.configure(box.adapter, base_model_name_or_path=None)
    box.refuses(3, "--base", run=lambda: box.run("plot", box.adapter, "-o", target))
    run = lambda: box.run("inspect", box.adapter, "--plot", target)  # noqa: E731
    box.refuses(3, "--base", run=run)


@pytest.mark.parametrize("name", ["picture", "picture.jpg", "picture.svg.gz", ".svg"])
def test_other_files(box: Sandbox, name: str) -> None:
    file = box.root / name
    box.refuses(
        3, ".png, .svg, .pdf", run=lambda: box.run("plot", box.adapter, "-b", box.base, "-o", file)
    )


def test_no_matplotlib(plot: Plot, box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before anything is read.
    box.factors.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    box.refuses(3, 'pip install "dora-convert[plot]"', run=plot)


def test_what_is_there_stays(plot: Plot, box: Sandbox, target: Path) -> None:
    target.write_text("old")
    box.refuses(5, "picture.svg is there already", "--overwrite", run=plot)
    assert plot("--overwrite").code == 0
    assert target.read_text() != "old"
    far = box.root / "none" / "p.svg"
    box.refuses(5, "no folder", run=lambda: box.run("plot", box.adapter, "-b", box.base, "-o", far))


def test_what_does_not_fit(plot: Plot, box: Sandbox) -> None:
    box.save_base(
        {name: t[:, :-1].clone() if t.ndim == 2 else t for name, t in box.load_base().items()}
    )
    box.refuses(4, "does not fit", run=plot)


@pytest.mark.parametrize("kind", ["movement", "spectrum"])
def test_rows_without_a_value(plot: Plot, box: Sandbox, kind: str) -> None:
    base = box.load_base()
    base[f"{MODULES[0]}.weight"][0, 0] = torch.nan
    box.save_base(base)
    if kind == "spectrum":
        box.refuses(4, "not defined", MODULES[0], run=lambda: plot("--kind", kind))
    else:
        result = plot("--kind", kind)
        assert result.code == 0
        assert "Note: 1 rows of 1 modules" in result.err


def test_a_selection(plot: Plot, target: Path) -> None:
    result = plot("--include", "*.q_proj")
    assert "Note: 2 of 4 modules left out" in result.err
    assert "v_proj" not in written(target)


def test_a_plain_lora(plot: Plot, box: Sandbox) -> None:
    factors = {n: t for n, t in box.load_adapter().items() if "magnitude" not in n}
    box.save_adapter(factors)
    box.configure(box.adapter, use_dora=False)
    curve, *_ = plot("--kind", "spectrum", "--json").json["shown"]
    assert curve["without_magnitude"] == 0
    assert curve["missed"][RANK - 2] > 0.01
    assert max(curve["missed"][RANK - 1 :]) < 1e-6  # it has this rank


def test_a_commit_is_shortened(target: Path) -> None:
    measures = Measures({"head": ModuleSums(rows=1, base=4.0, effect=1.0)}, "bfloat16")
    commit = "0123456789abcdef" * 2 + "01234567"
    save_picture(target, "layers", cells(measures), Path("me/dora"), f"org/model@{commit}")
    assert {"adapter me/dora", "base org/model@0123456789"} <= written(target)


def test_what_the_api_refuses(box: Sandbox, target: Path) -> None:
    with pytest.raises(UnknownNameError, match="no picture named 'pie'"):
        api.plot(box.adapter, target, base=box.base, how=api.PlotOptions(kind="pie"))
    with pytest.raises(InputError, match="a rank is 1 or more"):
        api.plot(box.adapter, target, base=box.base, how=api.PlotOptions(max_rank=0))


def test_inspect_draws_too(plot: Plot, box: Sandbox, target: Path) -> None:
    assert plot().code == 0
    drawn = digest(target)
    plain = box.run("inspect", box.adapter, "-b", box.base)

    def inspect(*options: object) -> Result:
        return box.run("inspect", box.adapter, "-b", box.base, "--plot", target, *options)

    box.refuses(5, "is there already", run=inspect)
    target.unlink()
    assert inspect() == plain
    assert digest(target) == drawn
    assert inspect("--overwrite").code == 0
    # Figures by groups or by modules, the picture is the same.
    assert inspect("--overwrite", "--per-module", "--json").code == 0
    assert digest(target) == drawn
