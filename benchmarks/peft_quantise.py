"""The road through whole models: PEFT merges, transformers loads that in a scheme and saves.

`python benchmarks/peft_quantise.py SCHEME BASE ADAPTER OUT`
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

__all__ = ["LIBRARY", "main"]

# What transformers is told, by scheme.
LIBRARY: dict[str, dict[str, object]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


def main(scheme: str, base: Path, adapter: Path, out: Path) -> None:
    """Keep nothing but `out`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=out.parent) as dense:
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(dense)
        del model
        config = BitsAndBytesConfig(**LIBRARY[scheme])
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=config, device_map="cpu"
        ).save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
