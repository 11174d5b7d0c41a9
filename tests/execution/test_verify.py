"""The check finds what is wrong, and passes what is right, by numbers made in these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_convert.core.adapter import MagnitudeAxis, TokenRows
from dora_convert.core.plan import Cast, Copy, Merge, PatchRows, Piece, Plan
from dora_convert.core.reports import Verification
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.execution import verify as module_of_verify
from dora_convert.execution.run import run
from dora_convert.execution.verify import verify
from dora_convert.storage.header import layout, read_header
from dora_convert.storage.pickled import read_pickle_header

from .conftest import Recorder, Store, exact, module, plan_of


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MagnitudeAxis)
def case(store: Store, request: pytest.FixtureRequest) -> tuple[Plan, dict[str, Tensor]]:
    """A plan with every operation, and the tensors that it must give."""
    axis: MagnitudeAxis = request.param
    rows, columns = 60, 20
    weight = random(rows, columns, seed=1).bfloat16()
    table, trained, bias = random(30, 8, seed=2), random(2, 8, seed=3), random(9, seed=4)
    parts = {
        "up": random(rows, 3, seed=5),
        "down": random(3, columns, seed=6),
        "m": random(rows if axis is MagnitudeAxis.OUT else columns, seed=7).abs() + 1,
    }
    base = store(w=weight, t=table, b=bias, n=torch.tensor(7))
    refs = store("adapter.safetensors", rows=trained, **parts)
    plan = plan_of(
        {
            "w": (
                Merge(base["w"], (Piece(0, rows, module(refs, axis)),)),
                DType.BF16,
                (rows, columns),
            ),
            "t": (PatchRows(base["t"], TokenRows((29, 4), refs["rows"])), DType.F32, (30, 8)),
            "b": (Copy(base["b"]), DType.F32, (9,)),
            "c": (Cast(base["b"]), DType.F16, (9,)),
            "n": (Copy(base["n"]), DType.I64, ()),
        }
    )
    patched = table.clone()
    patched[29], patched[4] = trained
    merged = exact(weight, **parts, dim=1 if axis is MagnitudeAxis.OUT else 0).bfloat16()
    right = {"w": merged, "t": patched, "b": bias, "c": bias.half(), "n": torch.tensor(7)}
    return plan, right


def check(
    plan: Plan, tensors: dict[str, Tensor], folder: Path, samples: int | None = None
) -> Verification:
    save_file(tensors, folder / "result.safetensors")
    files = dict.fromkeys(tensors, folder / "result.safetensors")
    return verify(plan, files, samples=samples)


@pytest.mark.parametrize("samples", [None, 1, 5])
def test_the_right_result_passes(
    case: tuple[Plan, dict[str, Tensor]], tmp_path: Path, samples: int | None
) -> None:
    plan, right = case
    result = check(plan, right, tmp_path, samples)
    assert result.differences == ()
    assert result.tensors == 5
    assert result.modules == 1
    assert result.rows == (60 if samples is None else samples)
    assert result.rounding is not None
    assert result.rounding.off == 0
    assert 0 < result.rounding.loss < 0.01


@pytest.mark.parametrize(
    ("name", "index"),
    [("w", (59, 19)), ("w", (0, 0)), ("t", (29, 0)), ("t", (3, 7)), ("b", (8,)), ("c", (0,))],
)
def test_one_changed_value_is_found(
    case: tuple[Plan, dict[str, Tensor]], tmp_path: Path, name: str, index: tuple[int, ...]
) -> None:
    plan, right = case
    wrong = {**right, name: right[name].clone()}
    wrong[name][index] = wrong[name][index] * 1.03 + 1e-3
    (difference,) = check(plan, wrong, tmp_path).differences
    assert difference.startswith(f"{name}: 1 ")


def test_a_changed_scalar_is_found(case: tuple[Plan, dict[str, Tensor]], tmp_path: Path) -> None:
    plan, right = case
    differences = check(plan, {**right, "n": torch.tensor(8)}, tmp_path).differences
    assert differences == ("n: its value differs",)


def test_a_merge_that_forgot_the_magnitude_is_found_by_a_sample(
    case: tuple[Plan, dict[str, Tensor]], tmp_path: Path
) -> None:
    plan, right = case
    wrong = {**right, "w": (right["w"].double() * 1.01).bfloat16()}
    assert check(plan, wrong, tmp_path, samples=4).differences


def test_a_sample_brings_its_rows_alone(
    case: tuple[Plan, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, right = case
    save_file(right, tmp_path / "m.safetensors")
    told: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(module_of_verify, "want", told.extend)
    files = dict.fromkeys(right, tmp_path / "m.safetensors")
    assert not verify(plan, files, samples=None).differences
    assert told == []
    assert not verify(plan, files, samples=3).differences
    held = (tmp_path / "m.safetensors").read_bytes()
    first, last = right["w"][0], right["w"][-1]
    rows = [held[begin:end] for _, begin, end in told]
    assert [len(row) for row in rows] == [40] * 3 + [32] * 3  # of the matrices w and t
    assert rows[0] == first.view(torch.uint8).numpy().tobytes()
    assert rows[2] == last.view(torch.uint8).numpy().tobytes()


def test_structure(case: tuple[Plan, dict[str, Tensor]], tmp_path: Path) -> None:
    plan, right = case
    wrong = {**right, "w": right["w"].float(), "b": right["b"][:5]}
    del wrong["t"]
    differences = check(plan, wrong, tmp_path).differences
    assert "w: F32 [60, 20], expected BF16 [60, 20]" in differences
    assert "b: F32 [5], expected F32 [9]" in differences
    assert "t: missing" in differences


@pytest.mark.parametrize("label", ["F4", "F6_E3M2"])
def test_types_that_torch_does_not_read(tmp_path: Path, label: str) -> None:
    """They are copied, and every byte of them is compared."""
    kind = DType[label]
    shape = (8, 12)
    data = bytes(range(96 * kind.bits // 8))
    head = layout([TensorSpec("x", kind, shape)]).head
    (tmp_path / "base.safetensors").write_bytes(head + data)
    refs = read_header(tmp_path / "base.safetensors")
    plan = plan_of({"x": (Copy(refs["x"]), kind, shape)})
    result = tmp_path / "result.safetensors"
    for at in (None, 0, len(data) - 1):
        changed = bytearray(data)
        if at is not None:
            changed[at] ^= 1
        result.write_bytes(head + changed)
        found = verify(plan, {"x": result}, samples=1)
        assert found.differences == (
            () if at is None else ("x: its bytes differ from their source",)
        )
        assert found.compared_bytes == (len(data) if at is None else 0)


def test_pickled_sources(tmp_path: Path, store: Store) -> None:
    weight, up, down, m = (
        random(6, 4, seed=1),
        random(6, 2, seed=2),
        random(2, 4, seed=3),
        random(6, seed=4),
    )
    torch.save({"w": weight, "up": up, "down": down, "m": m}, tmp_path / "all.bin")
    refs = read_pickle_header(tmp_path / "all.bin")
    op = Merge(refs["w"], (Piece(0, 6, module(refs)),))
    plan = plan_of({"w": (op, DType.F32, (6, 4)), "m": (Copy(refs["m"]), DType.F32, (6,))})
    right = {"w": exact(weight, up, down, m).float(), "m": m}
    assert check(plan, right, tmp_path).differences == ()
    assert check(plan, {**right, "m": m + 1}, tmp_path).differences


def test_zero_rows_stay_zero(tmp_path: Path, store: Store) -> None:
    weight, up, down = random(4, 3, seed=1), random(4, 2, seed=2), random(2, 3, seed=3)
    weight[1], up[1] = 0, 0
    refs = store("a.safetensors", up=up, down=down, m=torch.tensor([1.0, 0, 1, 1]))
    plan = plan_of(
        {"w": (Merge(store(w=weight)["w"], (Piece(0, 4, module(refs)),)), DType.F32, (4, 3))}
    )
    right = exact(weight, up, down, torch.tensor([1.0, 0, 1, 1])).nan_to_num(0).float()
    assert check(plan, {"w": right}, tmp_path).differences == ()
    right[1, 0] = torch.nan
    assert check(plan, {"w": right}, tmp_path).differences


@pytest.mark.parametrize("output", [DType.F32, DType.F16, DType.BF16])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32])
def test_what_the_kernel_writes_passes_in_every_pair_of_types(
    tmp_path: Path, store: Store, base: torch.dtype, output: DType
) -> None:
    weight, table = random(96, 80, seed=1).to(base), random(12, 5, seed=2).to(base)
    stored = store(w=weight, t=table)
    refs = store(
        "a.safetensors",
        up=random(96, 4, seed=3),
        down=random(4, 80, seed=4),
        m=random(96, seed=5).abs() + 1,
        rows=random(2, 5, seed=6),
    )
    plan = plan_of(
        {
            "w": (Merge(stored["w"], (Piece(0, 96, module(refs)),)), output, (96, 80)),
            "t": (PatchRows(stored["t"], TokenRows((7, 0), refs["rows"])), output, (12, 5)),
        }
    )
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", workers=1, listener=Recorder())
    files = dict.fromkeys(("w", "t"), tmp_path / "out" / "model.safetensors")
    assert verify(plan, files, samples=None).differences == ()
