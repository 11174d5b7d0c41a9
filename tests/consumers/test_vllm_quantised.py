"""A real vLLM engine on the CPU loads what `merge --quantize` writes, and computes with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dora_convert import api
from tests.consumers.cases import ALL, VOCABULARY, ids, model
from tests.consumers.environments import call, vllm
from tests.consumers.test_vllm import ENVIRONMENT, HERE
from tests.oracles.models import load, outputs, quiet, tokens, train

pytestmark = pytest.mark.slow


# Not w4a16: the CPU wheel of vLLM 0.32 has its kernel for some processors only.
@pytest.mark.parametrize("scheme", ["fp8_dynamic", "w8a8"])
@pytest.mark.filterwarnings("ignore")
def test_log_probabilities(scheme: str, tmp_path: Path) -> None:
    """Against transformers with the same file, which rounds activations as vLLM does."""
    made = train(
        tmp_path,
        model("llama", width=128).to(torch.bfloat16),
        tokens(VOCABULARY),
        target_modules=ALL,
        r=4,
    )
    out, dense = tmp_path / scheme, tmp_path / "dense"
    api.merge(made.adapter, out, base=made.base, how=api.MergeOptions(quantize=scheme))
    api.merge(made.adapter, dense, base=made.base)
    job = {"base": str(out), "loras": [], "dtype": "bfloat16", "tokens": ids(),
           "out": str(tmp_path / "out.npy")}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    call(vllm(), HERE / "run_vllm.py", tmp_path / "job.json", PYTHONPATH="", **ENVIRONMENT)

    (got,) = torch.from_numpy(np.load(tmp_path / "out.npy")).double()
    with quiet():
        quantised = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
        plain = load(made.base, AutoModelForCausalLM)
        merged = load(dense, AutoModelForCausalLM)
    same, base, exact = (
        outputs(each, tokens(VOCABULARY)).log_softmax(-1).flatten(0, 1)
        for each in (quantised, plain, merged)
    )
    adapter = float((exact - base).norm())
    # Both round to bfloat16 on the way, in another order.
    assert float((got - same).norm()) < 0.2 * adapter
    assert float((got - exact).norm()) < 0.5 * adapter
