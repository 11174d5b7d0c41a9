"""mlx-lm itself, on the CPU: it loads what `--for mlx` writes, and computes what PEFT does."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dora_convert.loras.mlx import MODELS
from tests.consumers.cases import Case, case, ids
from tests.oracles.models import distance

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model


def logits(base: Path, lora: Path | None = None) -> Tensor:
    with warnings.catch_warnings(), mx.stream(mx.cpu):
        warnings.simplefilter("ignore")
        model, _ = load_model(base)
        if lora is not None:
            model = load_adapters(model, str(lora))
            model.eval()
        return torch.from_numpy(np.array(model(mx.array(ids())).astype(mx.float32))).double()


def check(made: Case) -> None:
    goal = made.peft_outputs(made.lora("peft"))
    assert distance(made.base_outputs(), goal) > 0.01
    assert distance(logits(made.base), made.base_outputs()) < 1e-4
    assert distance(logits(made.base, made.lora("mlx")), goal) < 1e-4


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_logits(kind: str, tmp_path: Path) -> None:
    check(case(tmp_path, kind))


def test_a_head_and_one_layer_only(tmp_path: Path) -> None:
    check(case(tmp_path, "llama", ["lm_head", "layers.1.self_attn.v_proj"]))
