"""The road through whole models: PEFT merges, the scheme's library quantises that and saves.

`python benchmarks/peft_quantise.py SCHEME BASE ADAPTER OUT`
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

__all__ = ["LIBRARY", "main"]

# What transformers is told of bitsandbytes, by scheme.
_BITS: dict[str, dict[str, object]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
# And what compressed-tensors calls its own.
_PRESETS = {"fp8_dynamic": "FP8_DYNAMIC", "w8a8": "W8A8", "w8a16": "W8A16", "w4a16": "W4A16"}

LIBRARY = {**dict.fromkeys(_BITS, "transformers"), **dict.fromkeys(_PRESETS, "compressed-tensors")}


def main(scheme: str, base: Path, adapter: Path, out: Path) -> None:
    """Keep nothing but `out`."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    if scheme in _PRESETS:
        _compress(merged, _PRESETS[scheme], out)
        return
    with tempfile.TemporaryDirectory(dir=out.parent) as dense:
        merged.save_pretrained(dense)
        del loaded, merged
        config = BitsAndBytesConfig(**_BITS[scheme])
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=config, device_map="cpu"
        ).save_pretrained(out)


@torch.inference_mode()
def _compress(model: Any, preset: str, out: Path) -> None:
    """As llm-compressor does where no data are needed: scales, then codes, in memory."""
    groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        args = module.quantization_scheme.weights
        rows = module.weight.view(len(module.weight), -1, args.group_size or module.in_features)
        scale, zero = calculate_qparams(rows.amin(dim=2), rows.amax(dim=2), args)
        module.weight_scale.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
