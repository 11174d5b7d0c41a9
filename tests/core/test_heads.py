from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dora_convert.core.adapter import RowOrder
from dora_convert.core.heads import Heads, heads, reordered
from dora_convert.storage.header import read_header
from dora_convert.storage.reader import Reader


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_attention_heads": 4, "hidden_size": 64}, Heads(4, 4, 16)),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64},
            Heads(4, 2, 16),
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": None, "head_dim": 8},
            Heads(4, 4, 8),
        ),
        ({}, None),
        ({"num_attention_heads": 4}, None),
        ({"num_attention_heads": 4, "num_key_value_heads": 3, "head_dim": 8}, None),
        ({"num_attention_heads": "4", "head_dim": 8}, None),
        ({"num_attention_heads": True, "head_dim": 8}, None),
        ({"num_attention_heads": -4, "head_dim": 8}, None),
        ({"num_key_value_heads": 4, "head_dim": 8}, None),
    ],
)
def test_heads(config: dict[str, Any], expected: Heads | None) -> None:
    assert heads(config) == expected


# Two heads of six rows: entries i and i + 3 of a head turn together.
SIDE_BY_SIDE = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("shape", [(12,), (12, 3)])
def test_orders(shape: tuple[int, ...], tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(12, *(1 for _ in shape[1:])).expand(shape)
    interleaved = whole[SIDE_BY_SIDE]
    # What the same step makes of rows that were not interleaved: it is not undone by itself.
    halved = whole[[0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]]
    tensors = {"s": whole, "i": interleaved, "h": halved}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    for name, order in zip("sih", RowOrder, strict=True):
        found = reordered(stored[name], order, 6)
        assert found.spec.shape == shape
        assert torch.equal(Reader().load(found), whole), order


def test_each_order_undoes_the_other(tmp_path: Path) -> None:
    save_file({"a": torch.randn(16, 3)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["a"]
    there = reordered(stored, RowOrder.INTERLEAVED, 8)
    back = reordered(there, RowOrder.HALVED, 8)
    assert not torch.equal(Reader().load(there), Reader().load(stored))
    assert torch.equal(Reader().load(back), Reader().load(stored))
