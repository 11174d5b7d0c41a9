"""Files that are sound, and hold other tensors than they should: of other names, types and shapes.

Merged or refused, and what is merged is checked against the recomputation.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dora_convert import api
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError, MismatchError
from dora_convert.storage.header import layout, read_header
from tests.cli.sandbox import Sandbox, digest

Tensors: TypeAlias = dict[str, tuple[DType, tuple[int, ...], bytes]]

ENDINGS = (
    *(".weight", ".bias", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".default"),
    *(".lora_embedding_A", ".base_layer.weight", ".qweight", ".scales", ".weight.absmax", ".x"),
)
QUANTISED = ("nf4", "fp8", "int8")


def load(file: Path) -> Tensors:
    raw = file.read_bytes()
    found: Tensors = {}
    for name, ref in read_header(file).items():
        start = ref.source.start  # type: ignore[union-attr]
        found[name] = ref.spec.dtype, ref.spec.shape, raw[start : start + ref.spec.nbytes]
    return found


def save(file: Path, tensors: Tensors) -> None:
    made = layout([TensorSpec(name, kind, shape) for name, (kind, shape, _) in tensors.items()])
    out = bytearray(made.size)
    out[: len(made.head)] = made.head
    for name, (_, _, data) in tensors.items():
        out[made.starts[name] : made.starts[name] + len(data)] = data
    file.write_bytes(out)


def filled(
    kind: DType, shape: tuple[int, ...], data: bytes
) -> tuple[DType, tuple[int, ...], bytes]:
    """Of this type and shape, with as much of the old data as goes into it, over and over."""
    bits = math.prod(shape) * kind.bits
    if bits % 8 or bits > 1 << 22:
        kind, shape, bits = DType.U8, (4,), 32
    size = bits // 8
    return kind, shape, ((data or b"\1\2\3\4") * (size + 1))[:size]


def mutated(chance: random.Random, tensors: Tensors) -> Tensors:
    tensors = dict(tensors)
    for _ in range(chance.choice((1, 1, 2, 3))):
        name = chance.choice(list(tensors))
        kind, shape, data = tensors[name]
        sizes = list(shape)
        match chance.randrange(8):
            case 0:
                kind = chance.choice(list(DType))
            case 1 if sizes:
                sizes[chance.randrange(len(sizes))] = chance.choice((0, 1, 2, 3, 17, 31, 33, 64))
            case 2:
                sizes.insert(chance.randrange(len(sizes) + 1), chance.choice((0, 1, 1, 2)))
            case 3:
                sizes = sizes[1:] if chance.randrange(2) else sizes[:-1]
            case 4:
                sizes.reverse()
            case 5 if len(tensors) > 1:
                del tensors[name]
                continue
            case 6:
                stem, _, _ = name.rpartition(chance.choice((".weight", ".lora_", ".")))
                tensors[(stem or name) + chance.choice(ENDINGS)] = tensors.pop(name)
                continue
            case _:
                at = chance.randrange(len(data) + 1)
                data = data[:at] + bytes((chance.choice((0, 127, 128, 255)),)) + data[at + 1 :]
        tensors[name] = filled(kind, tuple(sizes), data)
    return tensors


@dataclass(frozen=True, slots=True)
class Case:
    """An adapter and a base, and what their files hold."""

    box: Sandbox
    files: dict[Path, Tensors] = field(repr=False)


def tried(case: Case, seed: int) -> bool:
    """Whether a merge of one mutant comes to an end; if not, what was there before still is."""
    box = case.box
    chance = random.Random(seed)
    changed = chance.choice(list(case.files))
    for file, tensors in case.files.items():
        save(file, mutated(chance, tensors) if file == changed else tensors)
    how = api.MergeOptions(workers=1, samples=4, restart=True, overwrite=True)
    before = digest(box.out)
    try:
        report = api.merge(box.adapter, box.out, base=box.base, how=how)
    except (InputError, MismatchError):
        assert digest(box.out) == before
        return False
    assert report.output is not None
    return True


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return opened(tmp_path_factory.mktemp("dense"))


def opened(root: Path, scheme: str | None = None) -> Case:
    box = Sandbox(root, lambda: pytest.fail("it runs no command"))
    if scheme is not None:
        plain = box.base.rename(box.root / "plain")
        how = api.MergeOptions(quantize=scheme, workers=1, samples=0)
        api.merge(box.adapter, box.base, base=plain, how=how)
    return Case(box, {file: load(file) for file in (box.weights, box.factors)})


@given(seed=st.integers(0, 2**32))
@example(seed=1867)  # an embedding without a shape
@settings(max_examples=60)
def test_other_tensors(dense: Case, seed: int) -> None:
    tried(dense, seed)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, *QUANTISED])
def test_many_other_tensors(tmp_path: Path, scheme: str | None) -> None:
    case = opened(tmp_path, scheme)
    ends = Counter(tried(case, seed) for seed in range(200))
    assert min(ends[True], ends[False]) > 20, ends
