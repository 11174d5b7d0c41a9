"""The LoRA of what a grid took, against float64 over whole tensors: Eckart and Young's optimum."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_convert import quant
from dora_convert.api.merging import Silent
from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.plan import Job, Piece, Plan, Quantise, Shard
from dora_convert.core.reports import Residual
from dora_convert.core.tensors import TensorRef, TensorSpec
from dora_convert.execution.decoding import decoded
from dora_convert.execution.residual import Missed, correct
from dora_convert.execution.run import run
from dora_convert.maths.lowrank import Factors
from dora_convert.maths.weighting import Weight
from dora_convert.storage.checkpoint import open_checkpoint
from tests.execution.conftest import Store, exact, module
from tests.quant.engine import find, normal, read, read_one, scheme, write

ROWS, COLUMNS, RANK = 384, 256, 8
Parts = dict[str, tuple[TensorRef, Piece]]


@dataclass
class Result:
    """What was stored, decoded by the miniature engine, and the pairs made for it."""

    stored: dict[str, Tensor]
    pairs: dict[str, Tensor]
    report: Residual


def corrected(
    folder: Path,
    name: str,
    parts: Parts,
    *,
    rank: int = RANK,
    weight: tuple[Weight, bool] | None = None,
) -> Result:
    """Quantise, and correct the file that was written."""
    jobs = {}
    for tensor, (base, piece) in parts.items():
        spec = TensorSpec(tensor, base.spec.dtype, base.spec.shape)
        layout = quant.writable(name).layout(spec)
        jobs[tensor] = Job(Quantise(base.matrix(), (piece,), name, layout), spec)
    folder.mkdir()
    plan = Plan((Shard("model.safetensors", tuple(jobs.values())),), ())
    run(plan, folder, workers=2, listener=Silent())
    (folder / "config.json").write_text(json.dumps(scheme(name).config([])))
    checkpoint = decoded(open_checkpoint(folder))
    missed: dict[str, list[Missed]] = {}
    for tensor, (_, piece) in parts.items():
        part = Missed(jobs[tensor], piece, checkpoint.tensors[tensor])
        missed.setdefault(piece.module.path, []).append(part)
    kept: dict[str, Factors] = {}
    report = correct(
        missed,
        rank,
        kept.__setitem__,
        folder=folder,
        workers=2,
        weights=None if weight is None else lambda _: weight,
    )
    assert not list(folder.glob("*.matrix"))
    tensors = load_file(folder / "model.safetensors")
    weights = find(scheme(name), scheme(name).config([]), tensors)
    stored = {n: read(scheme(name), w, tensors).double() for n, w in weights.items()}
    pairs = {p: (f.left * f.singular) @ f.right for p, f in kept.items()}
    return Result(stored, pairs, report)


def case(
    store: Store, dtype: torch.dtype = torch.bfloat16, *, dim: int = 1
) -> tuple[dict[str, TensorRef], dict[str, Tensor], Tensor]:
    """References, tensors, and W' by the paper's formula."""
    tensors = {
        "base": normal(ROWS, COLUMNS, dtype=dtype),
        "up": normal(ROWS, 4, dtype=torch.float32, seed=1),
        "down": normal(4, COLUMNS, dtype=torch.float32, seed=2),
    }
    tensors["m"] = tensors["base"].float().norm(dim=dim) * 1.05
    merged = exact(tensors["base"], tensors["up"], tensors["down"], tensors["m"], dim=dim)
    return store(**tensors), tensors, merged


def optimum(missed: Tensor, rank: int = RANK) -> float:
    """The least ||R - P|| of any P of that rank."""
    return float(torch.linalg.svdvals(missed)[rank:].square().sum().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["nf4", "nf4_dq", "w4a16", "w8a8", "fp8", "nvfp4a16", "mlx"])
def test_the_best_pair_of_its_rank(
    name: str, dtype: torch.dtype, store: Store, tmp_path: Path
) -> None:
    refs, t, merged = case(store, dtype)
    parts = {"a.weight": (refs["base"], Piece(0, ROWS, module(refs)))}
    got = corrected(tmp_path / "out", name, parts)
    held, pair = got.stored["a.weight"], got.pairs["layer"]
    missed, effect = merged - held, merged - t["base"].double()
    left = float((missed - pair).norm())
    assert torch.linalg.matrix_rank(pair) == RANK
    assert optimum(missed) * (1 - 1e-6) < left < 1.001 * optimum(missed)
    assert left < 0.97 * missed.norm()
    total = got.report.total
    assert got.report.modules == {"layer": total}
    assert total.error == pytest.approx(float(missed.norm() / merged.norm()), rel=1e-4)
    assert total.corrected_error == pytest.approx(left / float(merged.norm()), rel=1e-4)
    kept = float(((held - t["base"].double()) * effect).sum() / effect.square().sum())
    assert total.kept == pytest.approx(kept, abs=1e-4)
    kept += float((pair * effect).sum() / effect.square().sum())
    assert total.corrected_kept == pytest.approx(kept, abs=1e-4)


def test_a_small_update_comes_back(store: Store, tmp_path: Path) -> None:
    """On the grid it vanishes; its rank is that of the adapter, and the pair has all of it."""
    _, t, _ = case(store)
    wide = write(scheme("nf4"), t["base"].float())
    grid = read_one(scheme("nf4"), scheme("nf4").config([]), wide)
    refs = store("grid.safetensors", base=grid, up=t["up"] / 10, down=t["down"])
    plain = {"a.weight": (refs["base"], Piece(0, ROWS, module(refs)))}
    total = corrected(tmp_path / "out", "nf4", plain).report.total
    assert total.kept < 0.15
    assert total.corrected_kept > 0.999
    assert total.corrected_error < 0.4 * total.error


def test_axis_in(store: Store, tmp_path: Path) -> None:
    refs, _, merged = case(store, dim=0)
    piece = Piece(0, ROWS, module(refs, MagnitudeAxis.IN))
    got = corrected(tmp_path / "out", "w8a8", {"a.weight": (refs["base"], piece)})
    missed = merged - got.stored["a.weight"]
    assert float((missed - got.pairs["layer"]).norm()) < 1.001 * optimum(missed)


def test_a_module_in_two_tensors(store: Store, tmp_path: Path) -> None:
    """One pair for both, in the order of the module's rows."""
    refs, t, merged = case(store)
    cut = 128
    halves = store("two.safetensors", a=t["base"][:cut].clone(), b=t["base"][cut:].clone())
    parts = {
        "a.weight": (halves["a"], Piece(0, cut, module(refs))),
        "b.weight": (halves["b"], Piece(0, ROWS - cut, module(refs), cut)),
    }
    got = corrected(tmp_path / "out", "w4a16", parts)
    missed = merged - torch.cat([got.stored["a.weight"], got.stored["b.weight"]])
    assert got.pairs.keys() == {"layer"}
    assert float((missed - got.pairs["layer"]).norm()) < 1.001 * optimum(missed)


def test_rows_of_a_larger_tensor(store: Store, tmp_path: Path) -> None:
    """The pair is of the module's own rows, whatever else the tensor holds."""
    refs, t, _ = case(store)
    first, last = 100, 228
    own = replace(module(refs), delta=None)
    small = store("m.safetensors", m=t["m"][first:last].clone())
    piece = Piece(first, last, replace(own, magnitude=small["m"]))
    got = corrected(tmp_path / "out", "w8a8", {"a.weight": (refs["base"], piece)})
    w = t["base"][first:last].double()
    merged = w * (t["m"][first:last].double() / w.norm(dim=1))[:, None]
    missed = merged - got.stored["a.weight"][first:last]
    assert got.pairs["layer"].shape == (last - first, COLUMNS)
    assert float((missed - got.pairs["layer"]).norm()) < 1.001 * optimum(missed)


@pytest.mark.parametrize("flipped", [False, True])
def test_weighted(flipped: bool, store: Store, tmp_path: Path) -> None:
    """What counts is R L: the best of its rank there, and another pair than the plain one."""
    refs, _, merged = case(store)
    size = ROWS if flipped else COLUMNS
    diagonal = torch.logspace(-2, 2, size, dtype=torch.float64)
    parts = {"a.weight": (refs["base"], Piece(0, ROWS, module(refs)))}
    weight = (Weight(None, diagonal), flipped)
    got = corrected(tmp_path / "out", "w4a16", parts, weight=weight)
    missed, pair = merged - got.stored["a.weight"], got.pairs["layer"]
    if flipped:
        missed, pair = missed.T, pair.T
    seen = missed * diagonal
    assert float(((missed - pair) * diagonal).norm()) < 1.001 * optimum(seen)
    assert float((missed - pair).norm()) > 1.001 * optimum(missed)


def test_the_same_whatever_the_workers_and_the_rank(store: Store, tmp_path: Path) -> None:
    """A rank above the layer's own holds all of R."""
    refs, _, _ = case(store)
    parts = {"a.weight": (refs["base"], Piece(0, ROWS, module(refs)))}
    one, two = (corrected(tmp_path / n, "nf4", parts) for n in "ab")
    assert torch.equal(one.pairs["layer"], two.pairs["layer"])
    whole = corrected(tmp_path / "c", "nf4", parts, rank=4 * COLUMNS).report.total
    assert whole.corrected_error < 1e-5 < whole.error
