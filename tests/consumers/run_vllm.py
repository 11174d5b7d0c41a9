"""In vLLM's environment: `run_vllm.py JOB`, a JSON file; log probabilities go to `job["out"]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.lora.request import LoRARequest


def main(job: dict[str, object]) -> None:
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        ops.cpu_gemm_wna16 = _w4a16
    engine = LLM(
        model=job["base"],
        dtype=job.get("dtype", "float32"),
        load_format=job.get("load_format", "auto"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        **({"enable_lora": True, "max_lora_rank": job["rank"]} if job["loras"] else {}),
        max_model_len=64,
        max_num_seqs=8,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    rows = []
    for i, folder in enumerate([None, *job["loras"]]):
        request = LoRARequest(f"lora{i}", i, folder) if folder else None
        # Every beginning is a prompt of its own: log probabilities within a prompt are not given
        # where the head is adapted (punica_cpu.py, add_lora_logits).
        results = engine.generate(
            [{"prompt_token_ids": ids[: n + 1]} for ids in job["tokens"] for n in range(len(ids))],
            SamplingParams(max_tokens=1, logprobs=-1, temperature=0, detokenize=False),
            lora_request=request,
            use_tqdm=False,
        )
        rows.append([_row(result.outputs[0].logprobs[0]) for result in results])
    np.save(job["out"], np.array(rows))


def _w4a16(
    input: torch.Tensor,  # noqa: A002 - vLLM passes it by this name
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """In place of the kernel for 4-bit weights, which vLLM's wheel has for AVX-512 alone.

    `q_weight` is as vLLM has it in memory: of 16 outputs each, for every input, two words of eight
    codes; `scales` are [groups, out].
    """
    assert zeros is None
    assert pack_factor == 8
    words = q_weight.view(len(q_weight), -1, 2, 1)
    codes = (words >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    codes = codes.reshape(len(words), -1, 16).permute(1, 0, 2).reshape(-1, scales.shape[1])
    spread = scales.float().repeat_interleave(len(codes) // len(scales), dim=0)
    found = input.float() @ ((codes - 8) * spread)
    return (found if bias is None else found + bias).to(input.dtype)


def _row(at: dict[int, object]) -> list[float]:
    return [at[token].logprob for token in range(len(at))]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
