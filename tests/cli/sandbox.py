"""A small base, an adapter on it, and a way to run commands on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "ALPHA",
    "HIDDEN",
    "MODULES",
    "RANK",
    "VOCAB",
    "Result",
    "Sandbox",
    "digest",
    "make_base",
]

HIDDEN, INNER, KEYS, VOCAB, RANK, ALPHA = 32, 48, 16, 40, 4, 8
_SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN)}
_OTHERS = {
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = tuple(f"model.layers.{i}.{name}" for i in range(2) for name in _SHAPES)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as the one JSON object that it must be."""
        return json.loads(self.out)


def digest(*places: Path) -> dict[str, str]:
    """Content hashes of all files below."""
    files = [
        file
        for place in places
        for file in ([place] if place.is_file() else sorted(place.rglob("*")))
        if file.is_file()
    ]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def make_base(*, seed: int = 0, hidden: int = HIDDEN) -> dict[str, Tensor]:
    """Tensors of a Llama of two layers, whose rows have quite different norms."""
    random = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> Tensor:
        length = 0.5 + torch.rand((rows, 1), generator=random)
        return torch.randn((rows, columns), generator=random) * 0.05 * length

    tensors = {
        "model.embed_tokens.weight": weight(VOCAB, hidden),
        "lm_head.weight": weight(VOCAB, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(2):
        for name, shape in {**_SHAPES, **_OTHERS}.items():
            rows, columns = (hidden if n == HIDDEN else n for n in shape)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden)
    return tensors


def _make_adapter(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(9)
    tensors = {}
    for path in MODULES:
        weight = base[f"{path}.weight"]
        rows, columns = weight.shape
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = torch.randn((RANK, columns), generator=random) * 0.05
        tensors[f"{key}.lora_B.weight"] = torch.randn((rows, RANK), generator=random) * 0.02
        drift = 1 + 0.02 * torch.randn(rows, generator=random)
        tensors[f"{key}.lora_magnitude_vector"] = weight.norm(dim=1) * drift
    return tensors


class Sandbox:
    """`base`, `adapter` and `out` in one folder. `run` is filled in by the fixture."""

    def __init__(self, root: Path, run: Callable[..., Result]) -> None:
        self.root = root
        self.base, self.adapter, self.out = root / "base", root / "adapter", root / "out"
        self.run = run
        tensors = make_base()
        self.save_base(tensors)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": VOCAB,
            "tie_word_embeddings": False,
            "dtype": "float32",
        }
        (self.base / "config.json").write_text(json.dumps(config))
        self.save_adapter(_make_adapter(tensors))
        adapter = {
            "peft_type": "LORA",
            "use_dora": True,
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": ["q_proj", "v_proj"],
            "base_model_name_or_path": "someone/some-model",
        }
        (self.adapter / "adapter_config.json").write_text(json.dumps(adapter))

    @property
    def weights(self) -> Path:
        """The base's file of weights."""
        return self.base / "model.safetensors"

    @property
    def factors(self) -> Path:
        """The adapter's file of weights."""
        return self.adapter / "adapter_model.safetensors"

    def save_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights of the base."""
        self.base.mkdir(exist_ok=True)
        save_file(dict(tensors), self.weights, metadata={"format": "pt"})

    def save_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights of the adapter."""
        self.adapter.mkdir(exist_ok=True)
        save_file(dict(tensors), self.factors, metadata={"format": "pt"})

    def load_base(self) -> dict[str, Tensor]:
        """The base's tensors."""
        return load_file(self.weights)

    def load_adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors."""
        return load_file(self.factors)

    def configure(self, folder: Path, **changes: Any) -> None:
        """Change the config of `base` or `adapter`."""
        name = "config.json" if folder == self.base else "adapter_config.json"
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))

    def split(self) -> list[Path]:
        """Turn the base into two shards with an index."""
        tensors = self.load_base()
        names = sorted(tensors)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        places, files = {}, []
        for i, half in enumerate(halves, 1):
            files.append(self.base / f"model-{i:05}-of-00002.safetensors")
            save_file({name: tensors[name] for name in half}, files[-1])
            places |= dict.fromkeys(half, files[-1].name)
        self.index(places)
        self.weights.unlink()
        return files

    def index(self, places: Mapping[str, str]) -> None:
        """Write an index of the base."""
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(places)})
        (self.base / "model.safetensors.index.json").write_text(text)

    def merge(self, *options: object) -> Result:
        """`merge` of the adapter into the base."""
        return self.run("merge", self.adapter, "-b", self.base, "-o", self.out, *options)

    def refused(self, code: int, *words: str, options: Sequence[object] = ()) -> Result:
        """A merge ends with one message that has these words, and changes nothing."""
        return self.refuses(code, *words, run=lambda: self.merge(*options))

    def refuses(self, code: int, *words: str, run: Callable[[], Result]) -> Result:
        """`run` ends so."""
        before = digest(self.root)
        result = run()
        assert result.code == code, result
        assert result.out == ""
        lines = [line for line in result.err.splitlines() if not line.startswith("merged ")]
        assert lines[0].startswith("Error: "), result.err
        assert result.err.count("Error:") == 1, result.err
        assert "Traceback" not in result.err
        for word in words:
            assert word in result.err, (word, result.err)
        assert digest(self.root) == before
        assert not list(self.root.glob("*.partial"))
        return result
