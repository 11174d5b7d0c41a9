"""Tiny models adapted with PEFT, and what PEFT's unmerged model makes of an input."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_convert import api

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
TOLERANCE = 1e-5


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_peft_cases", FIXTURES / "make_peft_cases.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT and transformers warn about much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tokens(vocabulary: int = 96, length: int = 12) -> dict[str, Tensor]:
    """Every token of a small vocabulary comes up, so that no embedding row goes unseen."""
    generator = torch.Generator().manual_seed(3)
    rows = -(-vocabulary // length)
    ids = torch.randperm(rows * length, generator=generator) % vocabulary
    return {"input_ids": ids.view(rows, length)}


def pixels(channels: int = 3, size: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {"pixel_values": torch.randn(2, channels, size, size, generator=generator)}


@torch.no_grad()
def outputs(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """The first output: logits, or the last hidden state."""
    found: Tensor = model(**inputs)[0]
    return found.double()


def merged_by_formula(
    path: str, weight: Tensor, adapter: Mapping[str, Tensor], *, scaling: float
) -> Tensor:
    """`m V / ||V||` in float64 (arXiv 2402.09353) of PEFT's tensors; W where it has none."""
    key = f"base_model.model.{path}."
    exact = weight.double()
    if key + "lora_magnitude_vector" not in adapter:
        return exact
    down, up = (adapter[f"{key}lora_{part}.weight"].double() for part in "AB")
    direction = exact + scaling * up @ down
    length = direction.square().sum(dim=1, keepdim=True).sqrt()
    return adapter[key + "lora_magnitude_vector"].double().unsqueeze(1) * direction / length


@dataclass(frozen=True)
class Trained:
    """A base, an adapter on it, and the outputs of the two together, not merged."""

    base: Path
    adapter: Path
    inputs: dict[str, Tensor]
    outputs: Tensor


def train(
    folder: Path,
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    *,
    base: Path | None = None,
    change: Callable[[PeftModel], None] | None = None,
    prepare: Callable[[PreTrainedModel], None] | None = None,
    **lora: Any,
) -> Trained:
    """Save the model (unless `base` is it already), `prepare` it, adapt it, and save the adapter.

    `change` alters the adapter after its random training.
    """
    with quiet():
        model.eval()
        if base is None:
            base = folder / "base"
            model.save_pretrained(base)
        model.config._name_or_path = str(base)
        model.name_or_path = str(base)
        if prepare is not None:
            prepare(model)
        lora = {"r": 4, "lora_alpha": 8, "use_dora": True, "init_lora_weights": True} | lora
        adapted = get_peft_model(model, LoraConfig(**lora)).eval()
        MAKER.stir(adapted, torch.Generator().manual_seed(17))
        if change is not None:
            with torch.no_grad():
                change(adapted)
        MAKER.save_adapter(adapted, folder / "adapter")
        unmerged = outputs(adapted, inputs)
    return Trained(base, folder / "adapter", inputs, unmerged)


def merged(trained: Trained, out: Path, cls: Any, **options: Any) -> PreTrainedModel:
    """Merge, recompute all of it, and load it with nothing missing and nothing left over."""
    read = api.ReadOptions(**options)
    api.merge(
        trained.adapter, out, base=trained.base, options=read, how=api.MergeOptions(samples=0)
    )
    api.verify(out, adapter=trained.adapter, base=trained.base, options=read, samples=None)
    return load(out, cls)


def load(folder: Path, cls: Any) -> PreTrainedModel:
    with quiet():
        model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    loaded: PreTrainedModel = model.eval()
    return loaded


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def check(trained: Trained, out: Path, cls: Any, **options: Any) -> PreTrainedModel:
    model = merged(trained, out, cls, **options)
    assert distance(outputs(model, trained.inputs), trained.outputs) < TOLERANCE
    return model


class Convolutions(nn.Module):
    """One- and three-dimensional kernels, whose state dict is saved under plain names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 8, 4, padding=1)
        self.one_by_one = nn.Conv1d(8, 8, 1)
        self.three = nn.Conv3d(2, 6, (1, 2, 3))
        self.square = nn.Conv3d(6, 6, 1)

    def forward(self, signal: Tensor, volume: Tensor) -> tuple[Tensor]:
        flat = self.one_by_one(self.one(signal).tanh())
        deep = self.square(self.three(volume).tanh())
        return (torch.cat([flat.flatten(1), deep.flatten(1)], dim=1),)
