"""The survey of spectra: it runs, and knows what is missed from what is least."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dora_convert.maths.lowrank import Factors
from tests.cli.conftest import box, run
from tests.cli.sandbox import MODULES, Sandbox

__all__ = ["box", "run"]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spectra(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, which imports its neighbours by their names alone."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("spectra")
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_it_runs(spectra: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    spectra.main(["--tiny"])
    shown = capsys.readouterr().out
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")][2:]
    cases = {row[0].removeprefix("| "): int(row[1]) for row in rows}
    total = cases.pop("all")
    assert sum(cases.values()) == total
    assert {"power", "nearly equal", "DoRA", "noise"} < cases.keys()
    assert f"of {total} cases are more than 0.2% above the optimum" in shown


def test_what_is_found_is_missed_by(spectra: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 equal values the first 10 are the best, and the first 9 miss one value more."""

    def nine(operator: object, rank: int, generator: object, square: float) -> Factors:
        eye = torch.eye(300, dtype=torch.float64)[:, : rank - 1]
        return Factors(eye, torch.ones(rank - 1, dtype=torch.float64), eye.T)

    monkeypatch.setattr(spectra, "krylov_factors", nine)
    equal = spectra.Spectrum("equal", "equal", torch.ones(300, dtype=torch.float64))
    found = spectra.search(equal, 10, 0, torch.float64)
    assert found.excess == pytest.approx((291 / 290) ** 0.5 - 1)
    assert "0 of 1 cases are more than 0.2% above" in spectra.report([found])
    monkeypatch.setattr(spectra, "LIMIT", 0.001)
    assert "1 of 1 cases are more than 0.1% above" in spectra.report([found])
    assert "- equal, rank 10: 0.172%" in spectra.report([found])


def test_values_of_a_real_update(spectra: ModuleType, box: Sandbox) -> None:
    """They fall, and their squares add up to the update's own, by the paper's formula."""

    base, adapter = box.load_base(), box.load_adapter()
    found = list(spectra.real(box.base, box.adapter))
    assert [spectrum.name for spectrum in found] == sorted(MODULES)

    def stored(name: str) -> Tensor:
        return adapter[f"base_model.model.{name}"].double()

    for spectrum in found:
        path, w = spectrum.name, base[f"{spectrum.name}.weight"].double()
        v = w + 2 * stored(f"{path}.lora_B.weight") @ stored(f"{path}.lora_A.weight")
        m = stored(f"{path}.lora_magnitude_vector")
        update = (m / v.square().sum(dim=1).sqrt()).unsqueeze(1) * v - w
        assert float(spectrum.values.square().sum()) == pytest.approx(float(update.square().sum()))
        assert bool((spectrum.values.diff() <= 0).all())
