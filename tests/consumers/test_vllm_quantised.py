"""A real vLLM engine on the CPU loads what `merge --quantize` writes, and computes with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dora_convert import api
from tests.consumers.cases import ALL, VOCABULARY, ids, model
from tests.consumers.environments import call, vllm, vllm_plugin
from tests.consumers.test_vllm import ENVIRONMENT, HERE
from tests.oracles.models import Trained, load, outputs, quiet, tokens, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def trained(folder: Path) -> Trained:
    base = model("llama", width=128).to(torch.bfloat16)
    return train(folder, base, tokens(VOCABULARY), target_modules=ALL, r=4)


def in_vllm(folder: Path, base: Path, *loras: Path, plugin: bool = False) -> Tensor:
    """Log probabilities of the base, and with each LoRA."""
    job = {"base": str(base), "loras": [str(lora) for lora in loras], "rank": 64,
           "dtype": "bfloat16", "load_format": "bitsandbytes" if plugin else "auto",
           "tokens": ids(), "out": str(folder / "out.npy")}  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    path = str(vllm_plugin()) if plugin else ""
    call(vllm(), HERE / "run_vllm.py", folder / "job.json", PYTHONPATH=path, **ENVIRONMENT)
    return torch.from_numpy(np.load(folder / "out.npy")).double()


def in_transformers(loaded: torch.nn.Module) -> Tensor:
    return outputs(loaded, tokens(VOCABULARY)).log_softmax(-1).flatten(0, 1)


# The share of the adapter's effect by which scheme and rounding of activations may be off.
@pytest.mark.parametrize(
    ("scheme", "off"),
    [("fp8_dynamic", 0.5), ("w8a8", 0.5), ("w4a16", 1.0), ("nf4", 1.0), ("nf4_dq", 1.0)],
)
def test_log_probabilities(scheme: str, off: float, tmp_path: Path) -> None:
    """Against transformers with the same file, which rounds activations as vLLM does."""
    made = trained(tmp_path)
    out, dense = tmp_path / scheme, tmp_path / "dense"
    api.merge(made.adapter, out, base=made.base, how=api.MergeOptions(quantize=scheme))
    api.merge(made.adapter, dense, base=made.base)
    (got,) = in_vllm(tmp_path, out, plugin="nf4" in scheme)
    with quiet():
        quantised = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
        if "nf4" in scheme:  # what it computes in eval mode is wrong on some processors
            quantised.train()
        plain = load(made.base, AutoModelForCausalLM)
        merged = load(dense, AutoModelForCausalLM)
    same, base, exact = map(in_transformers, (quantised, plain, merged))
    adapter = float((exact - base).norm())
    # Both round to bfloat16 on the way, in another order.
    assert float((got - same).norm()) < 0.2 * adapter
    assert float((got - exact).norm()) < off * adapter


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "w4a16"])
def test_with_the_residual(scheme: str, tmp_path: Path) -> None:
    """The LoRA of what the scheme lost brings the engine nearer to the dense merge."""
    made = trained(tmp_path)
    out, dense = tmp_path / scheme, tmp_path / "dense"
    how = api.MergeOptions(quantize=scheme, residual=api.ResidualOptions(rank=64))
    api.merge(made.adapter, out, base=made.base, how=how)
    api.merge(made.adapter, dense, base=made.base)
    exact = in_transformers(load(dense, AutoModelForCausalLM))
    without, with_lora = in_vllm(tmp_path, out, out / "residual")
    assert float((with_lora - exact).norm()) < 0.8 * float((without - exact).norm())
