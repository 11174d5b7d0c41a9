"""A run that goes on where another stopped finds out the same, and writes the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_convert import api
from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.errors import MismatchError, OutputError
from tests.cli.sandbox import Sandbox, digest


class Stops:
    """A listener that ends the run when so many shards are done."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.files: list[str] = []

    def started(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def advanced(self, nbytes: int) -> None:
        self.nbytes -= nbytes

    def sealed(self, file: str) -> None:
        self.files.append(file)
        self.left -= 1
        if self.left == 0:
            raise OutputError("the plug was pulled")


def forbidden(*args: object) -> None:
    raise AssertionError(args)


@pytest.fixture
def box(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path, forbidden)
    # Square: a magnitude for each column is one for each row, and the axis must be said.
    made.configure(made.adapter, target_modules=["q_proj"])
    tensors = made.load_adapter()
    made.save_adapter({name: t for name, t in tensors.items() if "q_proj" in name})
    return made


@pytest.mark.parametrize("scheme", [None, "nvfp4a16", "fp8"])
@pytest.mark.parametrize("axis", MagnitudeAxis)
def test_same_result(box: Sandbox, scheme: str | None, axis: MagnitudeAxis) -> None:
    """Also where two passes are needed, and where tensors in several shards share a number."""
    options = api.ReadOptions(axis=axis)
    how = api.MergeOptions(
        max_shard_size=4000 if scheme is None else 1500, workers=1, samples=0, quantize=scheme
    )
    whole, out = box.root / "whole", box.root / "out"
    expected = api.merge(box.adapter, whole, base=box.base, options=options, how=how)
    assert expected.shards > 6

    for count in (3, 2):
        with pytest.raises(OutputError, match="the plug was pulled") as caught:
            api.merge(
                box.adapter, out, base=box.base, options=options, how=how, listener=Stops(count)
            )
        assert "the same command continues" in caught.value.__notes__[0]
    last = Stops(-1)
    report = api.merge(box.adapter, out, base=box.base, options=options, how=how, listener=last)
    assert report.kept == 5
    assert last.nbytes == 0
    assert report.kept + len(last.files) == report.shards
    assert report.survival == expected.survival
    assert (report.survival is None) == (scheme is None)
    names = {Path(name).relative_to(out): found for name, found in digest(out).items()}
    assert names == {Path(n).relative_to(whole): found for n, found in digest(whole).items()}


def test_faults_are_not_forgotten(box: Sandbox) -> None:
    """Rows that are not defined, in a shard that was finished before the interruption."""
    tensors = box.load_base()
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0
    factors = box.load_adapter()
    for name in factors:
        if "layers.0" in name and "lora_B" in name:
            factors[name][3] = 0
    box.save_base(tensors)
    box.save_adapter(factors)
    out = box.root / "out"
    how = api.MergeOptions(max_shard_size=4000, workers=1, samples=0)
    index = 0
    while True:
        index += 1
        with pytest.raises((OutputError, MismatchError)) as caught:
            api.merge(box.adapter, out, base=box.base, how=how, listener=Stops(index))
        if isinstance(caught.value, MismatchError):
            break
    # The last run had nothing to write but one shard, and found nothing in it.
    assert caught.value.problems == (
        "model.layers.0.self_attn.q_proj.weight: 1 rows are zero in the base, but have a magnitude",
    )
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
