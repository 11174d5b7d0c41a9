"""What a quantised result keeps of the update, against float64 over the whole tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_convert import quant
from dora_convert.api.merging import Silent
from dora_convert.core.adapter import DoraModule, MagnitudeAxis
from dora_convert.core.plan import Job, Piece, Plan, Quantise, Shard
from dora_convert.core.reports import Survival, SurvivalFigures
from dora_convert.core.tensors import DType, Encoded, TensorRef, TensorSpec
from dora_convert.execution.decoding import decoded as decode
from dora_convert.execution.run import run
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.dtypes import from_torch
from tests.execution.conftest import Store, exact, module, written
from tests.quant.engine import WRITABLE, normal, read_one, scheme, write, write_as

NAME = "a.weight"
ROWS, COLUMNS = 384, 256
OUT = MagnitudeAxis.OUT


def quantised(
    folder: Path,
    name: str,
    base: TensorRef,
    *pieces: Piece,
    workers: int = 2,
    scales: dict[str, TensorRef] | None = None,
) -> Survival:
    spec = TensorSpec(NAME, base.spec.dtype, base.spec.shape)
    weight = quant.writable(name).layout(spec)
    job = Job(Quantise(base.matrix(), pieces, name, weight, scales or {}), spec)
    plan = Plan((Shard("model.safetensors", (job,)),), ())
    result = run(plan, folder, workers=workers, listener=Silent())
    assert result.survival is not None
    return result.survival


def decoded(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The whole weight at once, by the scheme's own reading."""
    quantizer = scheme(name)
    return read_one(quantizer, quantizer.config([]), tensors).double()


def plainly(name: str, base: Tensor) -> dict[str, Tensor]:
    """The base itself in the scheme, with one rounding."""
    spec = TensorSpec(NAME, from_torch(base.dtype), tuple(base.shape))
    return write_as(scheme(name), scheme(name).layout(spec), base.float())


def figures(w: Tensor, merged: Tensor, stored: Tensor, plain: Tensor) -> SurvivalFigures:
    """The definitions, in float64."""
    effect = merged - w
    return SurvivalFigures(
        kept=float(((stored - w) * effect).sum() / effect.square().sum()),
        noise=float((stored - merged).norm() / effect.norm()),
        plain_noise=float((plain - w).norm() / effect.norm()),
        error=float((stored - merged).norm() / merged.norm()),
        plain_error=float((plain - w).norm() / w.norm()),
        codes_changed=0.0,
    )


def case(store: Store, *, size: float = 1.0) -> tuple[dict[str, TensorRef], dict[str, Tensor]]:
    tensors = {
        "base": normal(ROWS, COLUMNS),
        "up": normal(ROWS, 4, dtype=torch.float32, seed=1) * size,
        "down": normal(4, COLUMNS, dtype=torch.float32, seed=2) * 10,
    }
    tensors["m"] = tensors["base"].float().norm(dim=1) * (1 + 0.05 * size)
    return store(**tensors), tensors


def close(got: SurvivalFigures, expected: SurvivalFigures, tolerance: float) -> None:
    for field in ("kept", "noise", "plain_noise", "error", "plain_error"):
        assert getattr(got, field) == pytest.approx(getattr(expected, field), rel=tolerance), field


@pytest.mark.parametrize("name", WRITABLE)
def test_figures_are_those_of_the_file(name: str, store: Store, tmp_path: Path) -> None:
    refs, t = case(store)
    found = quantised(tmp_path, name, refs["base"], Piece(0, ROWS, module(refs)))
    merged = exact(t["base"], t["up"], t["down"], t["m"])
    plain = decoded(name, plainly(name, t["base"]))
    expected = figures(t["base"].double(), merged, decoded(name, written(tmp_path)), plain)
    assert found.scheme == name
    assert found.modules == {"layer": found.total}
    # Scales that belong to the whole tensor are those of W' also where W is quantised.
    close(found.total, expected, 0.02 if name in ("nvfp4a16", "nf4_dq", "fp4_dq") else 1e-4)


def test_rows_of_one_module_are_told_from_those_of_another(store: Store, tmp_path: Path) -> None:
    """Two modules in one tensor, and rows that belong to none."""
    refs, t = case(store)
    first = replace(module(refs), path="first")
    second = DoraModule("second", None, refs["m"], first.axis, 1.0)
    pieces = Piece(0, 100, first), Piece(228, ROWS, second, 228)
    found = quantised(tmp_path, "w8a8", refs["base"], *pieces)
    w, stored = t["base"].double(), decoded("w8a8", written(tmp_path))
    plain = decoded("w8a8", plainly("w8a8", t["base"]))
    merged = exact(t["base"], t["up"], t["down"], t["m"])
    scaled = w * (t["m"].double() / w.norm(dim=1))[:, None]
    rows = slice(0, 100)
    close(found.modules["first"], figures(w[rows], merged[rows], stored[rows], plain[rows]), 1e-4)
    rows = slice(228, ROWS)
    close(found.modules["second"], figures(w[rows], scaled[rows], stored[rows], plain[rows]), 1e-4)
    assert found.modules.keys() == {"first", "second"}


@pytest.mark.parametrize(("name", "bits"), [("w8a8", 8), ("w4a16", 4), ("nf4", 4), ("fp8", 8)])
def test_codes_that_changed(name: str, bits: int, store: Store, tmp_path: Path) -> None:
    """Counted one by one in what is stored of the base and of the result."""
    refs, t = case(store, size=0.02)
    found = quantised(tmp_path, name, refs["base"], Piece(0, ROWS, module(refs)))
    stored = written(tmp_path)
    before = plainly(name, t["base"])
    codes = next(n for n in (f"{NAME}_packed", NAME) if n in stored)
    one, other = (x[codes].contiguous().view(-1).view(torch.uint8) for x in (stored, before))
    changed = 0
    for shift in range(0, 8, bits):
        mask = (1 << bits) - 1
        changed += int((((one >> shift) & mask) != ((other >> shift) & mask)).sum())
    assert 0.001 < found.total.codes_changed < 0.9
    assert found.total.codes_changed == changed / (ROWS * COLUMNS)


def test_a_grid_swallows_what_is_smaller_than_its_steps(store: Store, tmp_path: Path) -> None:
    """Of an update of 1 % nothing is left on a base of the same grid, all of it off the grid."""
    _, t = case(store)
    # Of 32 bits, so that what is decoded is the grid itself.
    on_grid = decoded("nf4", write(scheme("nf4"), t["base"].float())).float()
    kept = {}
    for label, base in (("grid", on_grid), ("dense", t["base"].float())):
        folder = tmp_path / label
        folder.mkdir()
        refs = store(f"{label}.safetensors", base=base, up=t["up"] * 0.2, down=t["down"] / 10)
        found = quantised(folder, "nf4", refs["base"], Piece(0, ROWS, module(refs)))
        assert 0.003 < found.total.error / found.total.noise < 0.03  # ||T|| / ||W'||
        kept[label] = found.total.kept
        assert (found.total.plain_noise == 0) is (label == "grid")
    assert kept["dense"] == pytest.approx(1, abs=0.1)
    assert kept["grid"] < 0.15


@pytest.mark.parametrize("name", ["w4a16", "mlx", "w8a8", "w8a16", "fp8_dynamic"])
def test_scales_of_the_base_take_the_magnitudes(name: str, store: Store, tmp_path: Path) -> None:
    """Of rows that only become longer all is kept, and no code changes; a part changes in length.

    What is stored is the base's codes under the base's scales times m / ||W||, in float64.
    """
    _, t = case(store)
    own = write(scheme(name), t["base"])
    held = decoded(name, own)
    factor = torch.linspace(0.9, 1.1, ROWS).unsqueeze(1)
    m = (held * factor.double()).norm(dim=1).float()
    folder = tmp_path / "grid"
    folder.mkdir()
    save_file(own, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(scheme(name).config([])))
    base = decode(open_checkpoint(folder)).tensors[NAME]
    assert isinstance(base.source, Encoded)
    piece = Piece(0, ROWS, DoraModule("layer", None, store("m.safetensors", m=m)["m"], OUT, 1.0))
    found = {}
    for label in ("fold", "fresh"):
        out = tmp_path / label
        out.mkdir()
        folds = scheme(name).folds if label == "fold" else ()  # type: ignore[attr-defined]
        scales = {role: base.source.parts[role] for role in folds}
        found[label] = quantised(out, name, base, piece, scales=scales).total
    fold, fresh = found["fold"], found["fresh"]
    assert fold.kept == pytest.approx(1, abs=0.01)
    assert fold.codes_changed == 0
    assert fold.plain_noise < 1e-3
    assert fold.noise < (0.05 if name != "mlx" else 0.1)
    assert fold.noise <= fresh.noise * 1.01
    merged = held * factor.double()
    stored = decoded(name, written(tmp_path / "fold"))
    noise = float((stored - merged).norm() / (merged - held).norm())
    assert fold.noise == pytest.approx(noise, rel=1e-3)


def test_the_same_whatever_the_workers(store: Store, tmp_path: Path) -> None:
    refs, _ = case(store)
    found = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        piece = Piece(0, ROWS, module(refs))
        found.append(quantised(folder, "nf4", refs["base"], piece, workers=workers))
    assert found[0] == found[1]


def test_large_weights_are_measured_in_part(store: Store, tmp_path: Path) -> None:
    """Some blocks stand for all: the same within what chance allows."""
    rows, columns = 20_000, 256
    t = {
        "base": normal(rows, columns),
        "up": normal(rows, 2, dtype=torch.float32, seed=1),
        "down": normal(2, columns, dtype=torch.float32, seed=2),
    }
    refs = store(**t)
    found = quantised(tmp_path, "w8a8", refs["base"], Piece(0, rows, module(refs)))
    w = t["base"].double()
    merged = w + 0.5 * t["up"].double() @ t["down"].double()
    plain = decoded("w8a8", plainly("w8a8", t["base"]))
    close(found.total, figures(w, merged, decoded("w8a8", written(tmp_path)), plain), 0.03)


def test_no_adapter_nothing_to_keep(store: Store, tmp_path: Path) -> None:
    refs, _ = case(store)
    spec = TensorSpec(NAME, DType.BF16, (ROWS, COLUMNS))
    weight = quant.writable("w8a8").layout(spec)
    job = Job(Quantise(refs["base"], (), "w8a8", weight), spec)
    plan = Plan((Shard("model.safetensors", (job,)),), ())
    assert run(plan, tmp_path, workers=1, listener=Silent()).survival is None
