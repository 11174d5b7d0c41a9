"""The comparison: diffusers loads a UNet and adapter in bf16, fuses, saves. BASE ADAPTER OUT."""

from __future__ import annotations

import sys

import torch
from diffusers import UNet2DConditionModel


def main(base: str, adapter: str, out: str) -> None:
    model = UNet2DConditionModel.from_pretrained(base, torch_dtype=torch.bfloat16)
    model.load_lora_adapter(adapter, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
