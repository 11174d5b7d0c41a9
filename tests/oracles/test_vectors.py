"""Stored cases: adapters and merged weights that other programs wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_convert import api
from dora_convert.errors import InputError

FIXTURES = Path(__file__).parents[2] / "fixtures"
PEFT = FIXTURES / "peft"
NVIDIA = FIXTURES / "nvidia"
CASES = sorted(folder.name for folder in PEFT.iterdir() if folder.is_dir())
HALVES = [name for name in CASES if name in ("llama_bf16", "llama_fp16_layers")]


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@dataclass(frozen=True)
class Case:
    base: dict[str, Tensor]
    adapter: dict[str, Tensor]
    settings: dict[str, Any]
    expected: dict[str, Tensor]
    out: Path = field(repr=False)

    @property
    def merged(self) -> dict[str, Tensor]:
        return read(self.out)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def case(name: str) -> Case:
        folder, out = PEFT / name, tmp_path_factory.mktemp(name) / "out"
        api.merge(folder / "adapter", out, base=folder / "base")
        adapter = read(folder / "adapter")
        return Case(
            base=read(folder / "base"),
            adapter={k.removeprefix("base_model.model."): t for k, t in adapter.items()},
            settings=json.loads((folder / "adapter" / "adapter_config.json").read_text()),
            expected=load_file(folder / "expected.safetensors"),
            out=out,
        )

    return case


def formula(w: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
    """Equation 5 of the paper for a layer stored [out, in], in float64."""
    up, down = tensors["lora_B.weight"].double(), tensors["lora_A.weight"].double()
    v = w.double() + scaling * (up @ down)
    return tensors["lora_magnitude_vector"].double()[:, None] * v / v.norm(dim=1, keepdim=True)


def layer(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    start = f"{path}."
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def check_rounding(merged: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Rounded once, and rightly but where the exact value is halfway by all that float32 tells."""
    right = total = 0
    for key, value in exact.items():
        got = merged[key]
        rounded = value.to(got.dtype)
        excess = (got.double() - value).abs() - (rounded.double() - value).abs()
        slack = 4e-7 * value.abs().amax(dim=1, keepdim=True)
        assert bool((excess <= slack).all()), key
        right += int((got == rounded).sum())
        total += got.numel()
    assert total > 5_000
    assert right / total >= 0.9999


def test_there_are_cases() -> None:
    assert len(CASES) >= 12
    assert len(HALVES) == 2


@pytest.mark.parametrize("name", CASES)
def test_same_tensors(name: str, cases: Any) -> None:
    case = cases(name)
    got = {n: (t.dtype, t.shape) for n, t in case.merged.items()}
    assert got == {n: (t.dtype, t.shape) for n, t in case.expected.items()}


@pytest.mark.parametrize("name", [name for name in CASES if name not in HALVES])
def test_float32(name: str, cases: Any) -> None:
    case = cases(name)
    merged = case.merged
    for key, expected in case.expected.items():
        error = (merged[key].double() - expected.double()).norm()
        assert error <= 2e-6 * expected.double().norm(), key


@pytest.mark.parametrize("name", HALVES)
def test_sixteen_bits_are_rounded_once(name: str, cases: Any) -> None:
    case = cases(name)
    merged = case.merged
    scaling = case.settings["lora_alpha"] / case.settings["r"]
    exact = {
        key: formula(w, tensors, scaling)
        for key, w in case.base.items()
        if (tensors := layer(case.adapter, key.removesuffix(".weight")))
    }
    check_rounding(merged, exact)


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_adapted_stays_byte_for_byte(name: str, cases: Any) -> None:
    case = cases(name)
    merged = case.merged
    same = [k for k, w in case.base.items() if torch.equal(bits(case.expected[k]), bits(w))]
    assert same or name in ("bert_bias_all",)
    for key in same:
        assert torch.equal(bits(merged[key]), bits(case.base[key])), key


def test_ties_are_cut_in_the_config(cases: Any) -> None:
    before = json.loads((PEFT / "llama_tied" / "base" / "config.json").read_text())
    after = json.loads((cases("llama_tied").out / "config.json").read_text())
    assert before["tie_word_embeddings"] is True
    assert after == before | {"tie_word_embeddings": False}


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama_tied"])
def test_an_unchanged_config_is_carried_byte_for_byte(name: str, cases: Any) -> None:
    before = (PEFT / name / "base" / "config.json").read_bytes()
    assert (cases(name).out / "config.json").read_bytes() == before


# The paper's own code


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = tmp_path_factory.mktemp("nvidia") / "out"
    trusted = api.ReadOptions(allow_pickle=True)
    api.merge(NVIDIA / "adapter", out, base=NVIDIA / "base", options=trusted)
    return read(out)


def trained() -> dict[str, dict[str, Tensor]]:
    """Tensors of the reference's adapter, by module."""
    stored = torch.load(NVIDIA / "adapter" / "adapter_model.bin", weights_only=True)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        path, part, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        found.setdefault(path, {})[part] = tensor.double()
    return found


def test_nvidia_needs_the_pickle_allowed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pickle"):
        api.merge(NVIDIA / "adapter", tmp_path / "out", base=NVIDIA / "base")


def test_nvidia_is_the_formula(nvidia: dict[str, Tensor]) -> None:
    base, adapter = read(NVIDIA / "base"), trained()
    kinds = {frozenset(parts) for parts in adapter.values()}
    assert kinds == {
        frozenset({"lora_A", "lora_B", "weight_m_wdecomp"}),
        frozenset({"weight_m_wdecomp"}),
    }
    exact = {}
    for name, w in base.items():
        parts = adapter.get(name.removesuffix(".weight"))
        if parts is None:
            assert torch.equal(bits(nvidia[name]), bits(w))
            continue
        v = w.double()
        if "lora_A" in parts:
            v = v + 8 / 4 * parts["lora_B"] @ parts["lora_A"]
        exact[name] = parts["weight_m_wdecomp"] * v / v.norm(dim=1, keepdim=True)
        assert nvidia[name].dtype is w.dtype is torch.float16
    assert len(exact) == 14
    check_rounding(nvidia, exact)


def test_nvidia_is_what_its_own_merge_gives(nvidia: dict[str, Tensor]) -> None:
    """It rounds some steps to fp16, which has 11 bits: a few units in the last place."""
    reference = torch.load(NVIDIA / "reference_merge.pt", weights_only=True)
    merged = {name: t for name, t in reference.items() if name in nvidia}
    assert len(merged) >= 14
    for name, expected in merged.items():
        error = (nvidia[name].double() - expected.double()).norm() / expected.double().norm()
        assert error < 2e-3, name
