"""The comparison: PEFT loads base and adapter in bf16, merges and saves. BASE ADAPTER OUT."""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="1GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
