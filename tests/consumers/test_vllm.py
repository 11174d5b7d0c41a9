"""A real vLLM engine on the CPU gives PEFT's log probabilities with what `--for vllm` writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.consumers.cases import ALL, case, ids
from tests.consumers.environments import call, vllm

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def test_log_probabilities(tmp_path: Path) -> None:
    python = vllm()
    made = case(tmp_path, "llama", [*ALL, "lm_head", "embed_tokens"], width=128)
    loras = [
        made.lora("vllm", rank=12),
        made.lora("vllm", rank=64, compact=True),
    ]
    sparse = case(tmp_path / "sparse", "llama", ["layers.1.self_attn.k_proj"], width=128)
    loras.append(sparse.lora("vllm", rank=3))
    job = {"base": str(made.base), "loras": [str(lora) for lora in loras], "rank": 64,
           "tokens": ids(), "out": str(tmp_path / "out.npy")}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    call(python, HERE / "run_vllm.py", tmp_path / "job.json", PYTHONPATH="", **ENVIRONMENT)

    plain, *adapted = torch.from_numpy(np.load(tmp_path / "out.npy")).double()
    base = made.base_outputs().log_softmax(-1).flatten(0, 1)
    assert float((plain - base).abs().max()) < 1e-4
    for lora, got in zip(loras, adapted, strict=True):
        goal = made.peft_outputs(lora).log_softmax(-1).flatten(0, 1)
        assert float((got - goal).abs().max()) < 1e-4
        assert float((base - goal).abs().max()) > 1e-2
