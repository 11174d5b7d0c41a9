"""With llama-cpp-python on the path: `run_llama_cpp.py JOB`, a JSON file; logits go to `out`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(job: dict[str, object]) -> None:
    found = []
    for lora in [None, *job["loras"]]:
        model = llama_cpp.Llama(
            model_path=job["base"],
            lora_path=lora,
            n_ctx=64,
            logits_all=True,
            verbose=False,
            # Keys and values in float32: by default they are rounded to float16.
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
        )
        rows = []
        for ids in job["tokens"]:
            model.reset()
            model.eval(ids)
            rows.append(model.scores[: len(ids)].copy())
        found.append(rows)
        model.close()
    np.save(job["out"], np.array(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
