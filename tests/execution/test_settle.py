"""Measured against torch on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_convert.core.adapter import DoraModule, MagnitudeAxis, RowOrder
from dora_convert.core.deltas import LowRank
from dora_convert.core.evidence import Stretch, Subject
from dora_convert.execution.settle import axis_moments, order_moments, samples
from dora_convert.storage.header import read_header
from dora_convert.storage.reader import Reader

OUT, IN = MagnitudeAxis.OUT, MagnitudeAxis.IN
Maker = Callable[..., Subject]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(rows: int, columns: int, seed: int = 0) -> Tensor:
    return random(rows, columns, seed=seed) * random(rows, 1, seed=seed + 1).mul(0.3).exp()


@pytest.fixture
def subject(tmp_path: Path) -> Maker:
    made = iter(range(100))

    def make(m: Tensor, *weights: Tensor, transposed: bool = False) -> Subject:
        number = next(made)
        file = tmp_path / f"{number}.safetensors"
        held = {f"w{i}": w.contiguous() for i, w in enumerate(weights)} | {"m": m.contiguous()}
        out, inner = len(m), weights[0].shape[1]
        save_file(held | {"up": random(out, 2), "down": random(2, inner)}, file)
        refs = read_header(file)
        delta = LowRank(refs["down"], refs["up"])
        module = DoraModule(f"layer{number:02}", delta, refs["m"], OUT, 1.0)
        parts = [Stretch(refs[f"w{i}"], 0, len(w)) for i, w in enumerate(weights)]
        return Subject(module, tuple(parts), is_transposed=transposed)

    return make


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.double().log(), other.double().log()]))[0, 1])


def test_a_sample_of_all_rows(subject: Maker) -> None:
    weight = uneven(20, 12)
    norms = weight.double().norm(dim=1)
    m = (norms * (1 + 0.05 * random(20, seed=7))).float()
    (found,) = samples([subject(m, weight)], Reader(), workers=1)
    ratio = m.double() / norms
    assert found.ratio == pytest.approx(float(ratio.median()))
    assert found.change == pytest.approx(float((ratio - 1).abs().max()))
    assert found.level == pytest.approx(float(m.median()))
    assert found.spread == pytest.approx(float(m.double().log().std()))
    assert found.from_one == pytest.approx(float(m.double().log().square().mean()))
    assert found.from_norm == pytest.approx(float(ratio.log().square().mean()))
    assert found.moments.count == 20
    assert found.moments.correlation == pytest.approx(correlation(m, norms))


def test_a_sample_is_some_rows_of_some_modules(subject: Maker) -> None:
    weight = uneven(100, 4)
    whole = [subject(weight.norm(dim=1), weight) for _ in range(60)]
    found = samples(whole, Reader(), workers=3)
    assert 20 <= len(found) <= 48
    assert {s.moments.count for s in found} == {32}
    assert [s.subject.module.path for s in found] == sorted(s.subject.module.path for s in found)
    assert all(s.change < 1e-6 for s in found)


def test_a_weight_in_parts(subject: Maker) -> None:
    whole = uneven(20, 20)
    norms = whole.norm(dim=1)
    one, two = subject(norms, whole), subject(norms, whole[:7], whole[7:])
    first, second = (samples([s], Reader(), workers=1)[0] for s in (one, two))
    assert first.change == second.change < 1e-6
    axes = [axis_moments([s], Reader(), workers=1) for s in (one, two)]
    assert axes[0][OUT] == axes[1][OUT]


def test_signs_zeros_and_nan_say_nothing(subject: Maker) -> None:
    weight = uneven(8, 4)
    weight[2] = 0
    m = weight.norm(dim=1)
    m[3], m[4] = -m[3], 0
    (found,) = samples([subject(m, weight)], Reader(), workers=1)
    assert found.moments.count == 6
    assert found.change < 1e-6
    m[5] = torch.nan
    moments = axis_moments([subject(m[:4], weight[:4])], Reader(), workers=1)[OUT]
    assert moments.correlation == pytest.approx(1.0)
    assert samples([subject(torch.zeros(8), weight)], Reader(), workers=1) == []


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_axes(subject: Maker, dtype: torch.dtype, transposed: bool) -> None:
    weights = [uneven(24, 24, seed=i).to(dtype) for i in range(3)]
    m = [(w.double().norm(dim=1) * 1.02).float() for w in weights]
    held = [subject(x, w, transposed=transposed) for x, w in zip(m, weights, strict=True)]
    found = axis_moments(held, Reader(), workers=2)
    rows, columns = (IN, OUT) if transposed else (OUT, IN)
    assert found[rows].correlation == pytest.approx(1.0, abs=1e-6)
    assert found[rows].count == 72

    def centred(values: list[Tensor]) -> Tensor:
        logs = [v.double().log() for v in values]
        return torch.cat([v - v.mean() for v in logs])

    one, other = centred(m), centred([w.double().norm(dim=0) for w in weights])
    expected = float(one @ other / one.norm() / other.norm())
    assert found[columns].correlation == pytest.approx(expected)


def test_row_orders(subject: Maker) -> None:
    weight = uneven(32, 8)
    norms = weight.norm(dim=1)
    # Heads of eight rows: entry i beside entry i + 4.
    mixed = norms.reshape(4, 2, 4).transpose(1, 2).reshape(32)
    found = order_moments([subject(mixed, weight)], 8, Reader(), workers=1)
    assert found[RowOrder.INTERLEAVED].correlation == pytest.approx(1.0)
    assert found[RowOrder.SAME].correlation == pytest.approx(correlation(mixed, norms))
    assert found[RowOrder.SAME].correlation < 0.6


def test_nothing_to_measure() -> None:
    assert samples([], Reader(), workers=1) == []
    assert axis_moments([], Reader(), workers=1) == {}
    assert order_moments([], 8, Reader(), workers=1) == {}
