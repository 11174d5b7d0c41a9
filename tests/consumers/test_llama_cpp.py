"""llama.cpp itself: its converter makes the same tensors, and its engine PEFT's logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from dora_convert.core.llama_cpp import MODELS as ARCHITECTURES
from tests.consumers.cases import MODELS, TIED, Case, case, ids, targets
from tests.consumers.environments import call, llama_cpp
from tests.oracles.models import distance

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def tensors(file: Path) -> dict[str, tuple[list[int], int, bytes]]:
    return {
        str(t.name): (t.shape.tolist(), int(t.tensor_type), t.data.tobytes())
        for t in GGUFReader(file).tensors
    }


def fields(file: Path) -> dict[str, object]:
    reader = GGUFReader(file)
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith(("general.arch", "general.type", "adapter."))
    }


def converted(made: Case, lora: Path) -> Path:
    """The PEFT folder as llama.cpp's own script turns it."""
    out = made.folder / f"{lora.name}.gguf"
    script = llama_cpp() / "source" / "convert_lora_to_gguf.py"
    call(sys.executable, script, lora, "--base", made.base, "--outfile", out)
    return out


def test_all_architectures_are_tried() -> None:
    kinds = {name.lower().removesuffix("forcausallm") for name in ARCHITECTURES}
    assert kinds == {kind.removesuffix("_text") for kind in MODELS}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_tensors_of_the_converter(kind: str, tmp_path: Path) -> None:
    ends = [] if kind in TIED else ["lm_head", "embed_tokens"]
    made = case(tmp_path, kind, [*targets(kind), *ends])
    theirs = converted(made, made.lora("llama.cpp", "peft"))
    ours = made.lora("llama.cpp") / "adapter.gguf"
    assert tensors(ours) == tensors(theirs)
    layers = 6 if kind == "gemma3_text" else 2
    assert len(tensors(ours)) == 2 * (layers * len(targets(kind)) + len(ends))
    assert fields(ours) == fields(theirs)


@pytest.mark.parametrize(
    ("kind", "modules", "stack"),
    [
        ("llama", None, "llama.cpp"),
        ("llama", ["q_proj", "k_proj", "embed_tokens", "lm_head"], "llama.cpp"),
        ("qwen3", None, "ollama"),
        ("gemma2", None, "llama.cpp"),
        ("phi3", None, "llama.cpp"),
        ("llama", ["layers.1.self_attn.k_proj"], "any"),
    ],
)
def test_logits(kind: str, modules: list[str] | None, stack: str, tmp_path: Path) -> None:
    made = case(tmp_path, kind, modules)
    folder, base = llama_cpp(), tmp_path / "base.gguf"
    call(sys.executable, HERE / "convert_base.py", folder / "source", made.base, base)
    lora = made.lora(stack, "gguf") / "adapter.gguf"
    job = {"base": str(base), "loras": [str(lora)], "tokens": ids(),
           "out": str(tmp_path / "out.npy")}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    call(
        sys.executable, HERE / "run_llama_cpp.py", tmp_path / "job.json",
        PYTHONPATH=str(folder / "site"),
    )  # fmt: skip
    plain, adapted = torch.from_numpy(np.load(tmp_path / "out.npy")).double()
    # The rank that a stack pads to holds more of the update.
    goal = made.peft_outputs(made.lora("any" if stack == "any" else "peft", "peft"))
    floor = distance(plain, made.base_outputs())
    assert floor < 1e-3
    assert distance(adapted, goal) < max(3 * floor, 1e-4)
    assert distance(plain, goal) > 10 * max(3 * floor, 1e-4)
