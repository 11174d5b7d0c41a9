"""Time a merge into the UNet of SDXL, 5.1 GB in one file, against `cp` and diffusers.

`python benchmarks/image.py`: a DoRA of rank 16 on all attention and feed-forward layers and all
convolutions of the residual blocks. It takes twice 5.1 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from llama import RANK, write_header, write_tensor
from measure import run
from merge import OURS, PEFT, TORCH_ONLY, Case, comparison, data_folder, measure, own_peak, say
from safetensors.torch import save_file

# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 1),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "projection_class_embeddings_input_dim": 2816,
}
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")
FILE = "diffusion_pytorch_model.safetensors"


def make(folder: Path, config: dict[str, Any]) -> tuple[Path, Path, int]:
    """A base of random numbers, an adapter of it as diffusers saves it, and the base's bytes."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    with (base / FILE).open("wb") as file:
        write_header(file, shapes)
        for shape in shapes.values():
            matrix = shape if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
            write_tensor(file, matrix, generator)
    about = {"_class_name": "UNet2DConditionModel", **model.config}
    (base / "config.json").write_text(json.dumps(about))
    tensors = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path == name or not path.endswith((*ADAPTED, *CONVOLUTIONS)):
            continue
        ones = (1,) * (len(shape) - 2)
        inner = math.prod(shape[1:])
        down = torch.randn(RANK, *shape[1:], generator=generator) * 0.005
        up = torch.randn(shape[0], RANK, *ones, generator=generator) * 0.01
        magnitude = torch.full((shape[0],), 0.02 * inner**0.5)
        tensors[f"unet.{path}.lora_A.weight"] = down
        tensors[f"unet.{path}.lora_B.weight"] = up
        tensors[f"unet.{path}.lora_magnitude_vector"] = (
            magnitude.view(1, -1, *ones) if ones else magnitude
        )
    save_file(tensors, adapter / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    say(f"{len(shapes)} tensors, {len(tensors) // 3} adapted")
    return base, adapter, (base / FILE).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command (3)")
    parser.add_argument("--dir", type=Path, help="where the data goes (a new temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, to try this script")
    options = parser.parse_args()
    run(TORCH_ONLY)
    torch_only = own_peak(run(TORCH_ONLY, sampled=True) for _ in range(3))
    with data_folder(options.dir) as folder:
        base, adapter, nbytes = make(Path(folder), SDXL | TINY if options.tiny else SDXL)
        case = Case(base, adapter, Path(folder, "outputs", "merged"))
        commands = case.commands(peft=True)
        child = Path(__file__).with_name("diffusers_merge.py")
        commands[PEFT] = [sys.executable, child, base, adapter, case.out]
        runs = measure(case, commands, options.rounds)
    assert OURS in runs
    print(f"{nbytes / 1e9:.2f} GB of bf16; PEFT is diffusers' fuse_lora\n")
    print(comparison(runs, torch_only))


if __name__ == "__main__":
    main()
