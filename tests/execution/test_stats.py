"""Moments against dense float64 ones, and files that are none of these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_convert.errors import InputError, MismatchError
from dora_convert.execution.stats import LIMIT, Sketch, collect, open_stats, save_stats
from dora_convert.maths.weighting import Weight


def moment(weight: Weight) -> Tensor:
    assert weight.factor is not None
    found = weight.factor @ weight.factor.T
    return found if weight.diagonal is None else found + torch.diag(weight.diagonal**2)


@pytest.mark.parametrize("size", [30, LIMIT + 40])
def test_a_sketch(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, size, generator=generator, dtype=torch.float64)
    x = torch.randn(300, 40, generator=generator, dtype=torch.float64) @ mixing
    sketch = Sketch(size)
    for part in x.split(70):
        sketch.add(part)
    expected = x.T @ x / 300
    found = moment(sketch.weight())
    # Of rank 40, which a sketch of 512 columns holds whole.
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())


def test_a_sketch_keeps_the_diagonal() -> None:
    x = torch.randn(2000, LIMIT + 40, generator=torch.Generator().manual_seed(1)).double()
    sketch = Sketch(LIMIT + 40)
    sketch.add(x)
    assert torch.allclose(moment(sketch.weight()).diag(), x.square().mean(dim=0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.query(x) + self.key(x))


def test_collected_and_stored(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, batches = Model(), [torch.randn(1, n, 6) for n in (5, 9, 2)]
    sketches = collect(model, [{"x": batch} for batch in batches])
    assert sketches["query"] is sketches["key"]
    assert sketches["out"] is not sketches["key"]
    save_stats(tmp_path / "s", sketches, mark="abc")
    stats = open_stats(tmp_path / "s", mark="abc")
    entry = stats.find("model.query")
    assert entry is not None
    assert entry == stats.find("key")
    assert stats.find("other") is None
    assert stats.size(entry) == 6
    x = torch.cat(batches, dim=1)[0].double()
    assert torch.allclose(moment(stats.weight(entry)), x.T @ x / 16, atol=1e-5)
    with pytest.raises(MismatchError, match="another base"):
        open_stats(tmp_path / "s", mark="abd")


def test_no_such_file(tmp_path: Path) -> None:
    save_file({"0.factor": torch.zeros(3, 3)}, tmp_path / "s")
    with pytest.raises(InputError, match="does not hold statistics"):
        open_stats(tmp_path / "s", mark="abc")
