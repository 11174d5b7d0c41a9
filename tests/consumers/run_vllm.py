"""In vLLM's environment: `run_vllm.py JOB`, a JSON file; log probabilities go to `job["out"]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(job: dict[str, object]) -> None:
    engine = LLM(
        model=job["base"],
        dtype=job.get("dtype", "float32"),
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


def _row(at: dict[int, object]) -> list[float]:
    return [at[token].logprob for token in range(len(at))]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
