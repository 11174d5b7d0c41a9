"""The comparisons of to_lora.py, on one layer: BASE ADAPTER RANK LORA. Prints one JSON object.

PEFT's `convert_to_lora`, and full singular value decompositions of the updates. For each the
seconds, those of CPU, and what it misses of the update T = m V / ||V|| - W, in float64; LORA is the
folder that dora-convert wrote for the same rank.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

PREFIX = "base_model.model."


def updates(model: torch.nn.Module, adapter: Path) -> dict[str, Tensor]:
    """The formula of arXiv 2402.09353 by module path, float64."""
    weights, parts = model.state_dict(), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    found = {}
    for key, magnitude in parts.items():
        name, _, part = key.rpartition(".")
        if part == "lora_magnitude_vector":
            path = name.removeprefix(PREFIX)
            base = weights[f"{path}.weight"].double()
            down, up = (parts[f"{name}.lora_{x}.weight"].double() for x in "AB")
            direction = base + scaling * (up @ down)
            length = direction.square().sum(dim=1, keepdim=True).sqrt()
            found[path] = magnitude.double().unsqueeze(1) * direction / length - base
    return found


def missed(pairs: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """||T - BA|| / ||T|| over all modules, for factors of scale 1."""
    lost = total = 0.0
    for path, update in truth.items():
        key = f"{PREFIX}{path}."
        product = pairs[key + "lora_B.weight"].double() @ pairs[key + "lora_A.weight"].double()
        lost += float((update - product).square().sum())
        total += float(update.square().sum())
    return math.sqrt(lost / total)


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(begun: tuple[float, float]) -> dict[str, float]:
    seconds, cpu = (b - a for a, b in zip(begun, now(), strict=True))
    return {"seconds": seconds, "cpu": cpu}


def main(base: str, adapter: str, rank: int, lora: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    truth = updates(model, Path(adapter))

    begun = now()
    exact = {}
    for path, update in truth.items():
        left, singular, right = torch.linalg.svd(update.float(), full_matrices=False)
        exact[f"{PREFIX}{path}.lora_B.weight"] = left[:, :rank] * singular[:rank]
        exact[f"{PREFIX}{path}.lora_A.weight"] = right[:rank]
    svd = since(begun)

    adapted = PeftModel.from_pretrained(model, adapter)
    begun = now()
    config, state = convert_to_lora(adapted, rank=rank, progressbar=False)
    peft = since(begun)
    scaling = config.lora_alpha / config.r
    theirs = {k: v * scaling if "lora_B" in k else v for k, v in state.items()}
    ours = load_file(Path(lora) / "adapter_model.safetensors")
    result = {
        "modules": len(truth),
        "svd": {**svd, "missed": missed(exact, truth)},
        "peft": {**peft, "missed": missed(theirs, truth)},
        "ours": {"missed": missed(ours, truth)},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
