"""Odd magnitudes, by what a sample says of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dora_convert.core.adapter import Adapter, MagnitudeKind
from dora_convert.core.evidence import Moments, Sample, Stretch, Subject
from dora_convert.core.tensors import DType
from dora_convert.errors import MismatchError
from dora_convert.planning.doubts import without_doubts

from ..core.values import adapter, dora, ref

WIDTH = 64
NAMES = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
CONFIG = {"initializer_range": 0.02}


def sample(name: str, **measured: float) -> Sample:
    """What a sound training leaves: lengths of about 2, moved by some percent."""
    module = dora(f"model.layers.0.{name}", WIDTH, WIDTH)
    usual = {"ratio": 1.0, "change": 0.1, "level": 2.0, "spread": 0.3}
    usual |= {"from_one": 0.5, "from_norm": 0.001, "correlation": 0.98} | measured
    moments = Moments(32, 1.0, 1.0, usual.pop("correlation"))
    weight = (Stretch(ref("w", WIDTH, WIDTH), 0, WIDTH),)
    return Sample(Subject(module, weight), moments=moments, **usual)


def settled(*seen: Sample, config: Any = CONFIG) -> Adapter:
    held = adapter(*(s.subject.module for s in seen))
    return without_doubts(held, config, seen)


def all_of(**measured: float) -> list[Sample]:
    return [sample(name, **measured) for name in NAMES]


def test_nothing_odd() -> None:
    found = settled(*all_of())
    assert found.notes == ()
    assert {m.magnitude_is for m in found.modules.values()} == {MagnitudeKind.NORM}
    assert without_doubts(found, CONFIG, []) is found


def test_not_trained() -> None:
    found = settled(*all_of(change=9e-4))
    assert found.notes == ("the magnitudes are the base's own norms: they were not trained",)
    assert settled(*all_of(change=9e-4)[1:], sample("q_proj", change=2e-3)).notes == ()


@pytest.mark.parametrize("which", ["magnitude", "base"])
def test_not_trained_in_bfloat16(which: str) -> None:
    """A norm of 8 bits is off by its rounding."""

    def coarse(one: Sample) -> Sample:
        module, (part,) = one.subject.module, one.subject.weight
        if which == "magnitude":
            module = replace(module, magnitude=ref("m", WIDTH, dtype=DType.BF16))
        else:
            part = replace(part, base=ref("w", WIDTH, WIDTH, dtype=DType.BF16))
        return replace(one, subject=Subject(module, (part,)))

    assert settled(*map(coarse, all_of(change=3e-3))).notes
    assert not settled(*map(coarse, all_of(change=5e-3))).notes


def test_factors() -> None:
    """`m / ||V||`: about 1, whatever the norms."""
    about_one = {"level": 1.0, "from_one": 0.01, "from_norm": 0.8, "correlation": 0.1}
    found = settled(*all_of(**about_one, ratio=0.5))
    assert {m.magnitude_is for m in found.modules.values()} == {MagnitudeKind.FACTOR}
    assert "TensorRT-LLM" in found.notes[0]


@pytest.mark.parametrize(
    "measured",
    [
        # Norms of about 1 themselves.
        {"from_one": 0.01, "from_norm": 0.002, "correlation": 0.1},
        # They go with the base's norms.
        {"from_one": 0.05, "from_norm": 0.3, "correlation": 0.9},
        # Far from 1.
        {"from_one": 0.5, "from_norm": 3.0, "correlation": 0.0},
    ],
)
def test_no_factors(measured: dict[str, float]) -> None:
    found = settled(*all_of(**measured))
    assert {m.magnitude_is for m in found.modules.values()} == {MagnitudeKind.NORM}
    assert found.notes == ()


OLD_MLX = {"level": 0.58, "spread": 0.04, "from_one": 0.3, "from_norm": 1.5, "correlation": 0.0}


def test_constant() -> None:
    found = settled(*all_of(**OLD_MLX))
    assert "near 0.577" in found.notes[0]
    assert {m.magnitude_is for m in found.modules.values()} == {MagnitudeKind.NORM}
    assert settled(*all_of(**{**OLD_MLX, "level": 0.7})).notes == ()
    assert settled(*all_of(**{**OLD_MLX, "spread": 0.2})).notes == ()
    # A base that is so itself.
    assert settled(*all_of(**{**OLD_MLX, "from_norm": 0.001, "correlation": 0.9})).notes == ()


INITIAL = {"level": 0.02 * 8.1, "spread": 0.09, "from_norm": 2.0, "correlation": 0.05}


@pytest.mark.parametrize("config", [CONFIG, {"text_config": CONFIG}])
def test_norms_of_a_new_model(config: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="only just initialised") as caught:
        settled(*all_of(**INITIAL), config=config)
    assert "NeMo" in caught.value.hint


@pytest.mark.parametrize(
    ("measured", "config"),
    [
        (INITIAL, {}),
        (INITIAL, {"initializer_range": "0.02"}),
        (INITIAL, {"initializer_range": 0.03}),
        ({**INITIAL, "spread": 0.4}, CONFIG),
        # The base is a new model itself, as in a test.
        ({**INITIAL, "from_norm": 0.001, "correlation": 0.9}, CONFIG),
    ],
)
def test_no_norms_of_a_new_model(measured: dict[str, float], config: dict[str, Any]) -> None:
    assert settled(*all_of(**measured), config=config).notes == ()


def shards(processes: int, *, others: float = 1.0, off: float = 1.0) -> list[Sample]:
    local = off / math.sqrt(processes)
    return [sample(n, ratio=local if n in ("o_proj", "down_proj") else others) for n in NAMES]


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("off", [0.96, 1.04])
def test_norms_of_parts_of_rows(processes: int, off: float) -> None:
    with pytest.raises(MismatchError, match=f"{processes} tensor-parallel processes") as caught:
        settled(*shards(processes, off=off))
    assert caught.value.problems == ("model.layers.0.down_proj", "model.layers.0.o_proj")


def test_no_norms_of_parts_of_rows() -> None:
    settled(*shards(1))
    settled(*shards(2, off=1.2))
    settled(*shards(2, others=0.7))
    settled(*shards(2)[2:3])
    mixed = shards(2)
    mixed[2] = sample("o_proj", ratio=1.0)
    settled(*mixed)
