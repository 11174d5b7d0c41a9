"""Files that are kept open while a result is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dora_convert.core.plan import Cast
from dora_convert.core.tensors import DType
from dora_convert.execution import handles
from dora_convert.execution import verify as verifying
from dora_convert.execution.run import run

from .conftest import Recorder, Store, plan_of, random


@pytest.fixture(autouse=True)
def _closed() -> None:
    handles.close_handles()


def test_a_file_that_was_written_anew_is_opened_anew(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    first = handles.handle(file)
    assert handles.handle(file) is first
    save_file({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").replace(file)
    assert handles.handle(file).get_tensor("a").tolist() == [1, 1]
    assert first.get_tensor("a").tolist() == [0, 0]


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        handles.handle(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(SafetensorError):
        handles.handle(tmp_path / "x.safetensors")


def test_each_file_is_opened_once(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for each of its tensors: every time its header is parsed."""
    base = store(**{f"w{i}": random(3, 4) for i in range(20)})
    plan = plan_of({name: (Cast(ref), DType.F16, (3, 4)) for name, ref in base.items()})
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", workers=2, listener=Recorder())
    (shard,) = plan.shards
    files = {spec.name: tmp_path / "out" / shard.file for spec in shard.specs}
    monkeypatch.setattr(verifying, "close_handles", lambda: None)
    result = verifying.verify(plan, files, samples=None)
    assert not result.differences
    assert handles._opened.cache_info().misses == 2  # the result, and the base
    monkeypatch.undo()
    verifying.verify(plan, files, samples=None)
    assert handles._opened.cache_info().currsize == 0
