from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from dora_convert import api

from .models import FIXTURES, TOLERANCE, distance, load, outputs, quiet, tokens

NAMES = ("llama_patterns_rslora", "gpt2_conv1d", "llama_embed_head")


@pytest.mark.parametrize("scale", [0.5, 0.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_scale_is_set_scale(name: str, scale: float, tmp_path: Path) -> None:
    folder = FIXTURES / "peft" / name
    with quiet():
        base = load(folder / "base", AutoModelForCausalLM)
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
        full = outputs(adapted, tokens())
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", scale)
        expected = outputs(adapted, tokens())
    assert distance(full, expected) > 0.01

    options = api.ReadOptions(scale=scale)
    out = tmp_path / "out"
    api.merge(folder / "adapter", out, base=folder / "base", options=options)
    merged = load(out, AutoModelForCausalLM)
    assert distance(outputs(merged, tokens()), expected) < TOLERANCE
    verified = api.verify(
        out, adapter=folder / "adapter", base=folder / "base", options=options, samples=None
    )
    assert verified.differences == ()
