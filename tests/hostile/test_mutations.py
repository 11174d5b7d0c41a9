"""Thousands of broken headers, indexes, configs and descriptions: refused, or rightly understood.

What "rightly" means is said in `fuzz.targets`; for headers it is what safetensors' own parser says.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS

from .mutations import mutated_document, mutated_header, mutated_text

Mutate: TypeAlias = Callable[[random.Random, bytes], bytes]

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
WAYS: dict[str, tuple[Mutate, ...]] = {
    "header": (mutated_header,),
    "index": (mutated_text, mutated_document),
    "model_config": (mutated_text, mutated_document),
    "peft_config": (mutated_text, mutated_document),
    "quantized": (mutated_text, mutated_document),
    "spec": (mutated_text,),
}
CASES = {
    "header": 4000,
    "index": 2000,
    "model_config": 1500,
    "peft_config": 1500,
    "quantized": 3000,
    "spec": 1000,
}
USUAL = {
    "header": ("usual", "odd"),
    "index": ("usual",),
    "model_config": ("usual", "nested"),
    "peft_config": ("usual",),
    "quantized": ("hqq", "modelopt", "torchao"),
    "spec": ("peft", "example"),
}


def cases(name: str, seed: int) -> Iterator[bytes]:
    """Mutants of the files that are understood, without end."""
    chance = random.Random(seed)
    files = [(CORPUS / name / file).read_bytes() for file in USUAL[name]]
    while True:
        yield chance.choice(WAYS[name])(chance, chance.choice(files))


Try: TypeAlias = Callable[[str, bytes], bool]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Try:
    """Whether a parser takes these bytes; each has a folder of its own."""
    folders = {name: tmp_path_factory.mktemp(name) for name in TARGETS}
    return lambda name, data: TARGETS[name](data, folders[name])


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=80)
def test_mutants(tried: Try, name: str, seed: int) -> None:
    tried(name, next(cases(name, seed)))


def test_mutations_do_reach_what_is_behind_the_syntax(tried: Try) -> None:
    """Or the tests here would show little: many are taken, and many refused."""
    for name in ("header", "index", "model_config", "peft_config", "quantized"):
        mutants = cases(name, seed=1)
        taken = sum(tried(name, next(mutants)) for _ in range(120))
        assert 6 <= taken <= 110, (name, taken)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_mutants(tried: Try, name: str) -> None:
    """All together; none takes 2 s of processor time or 200 MB of memory."""
    mutants = cases(name, seed=20_240_214)
    ends: Counter[bool] = Counter()
    for _ in range(CASES[name]):
        data = next(mutants)
        begun = time.process_time()
        ends[tried(name, data)] += 1
        assert time.process_time() - begun < 2, data
    assert min(ends.values()) > CASES[name] // 100, ends
    tracemalloc.start()
    try:
        for _ in range(CASES[name] // 10):
            tried(name, next(mutants))
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
