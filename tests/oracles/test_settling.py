"""Simulated trainings whose files leave something open: the base decides, or it is refused.

Weights are drawn, an adapter is trained a little in float64, and its files are written as the
trainer at hand leaves them; expected weights are the formula on what was drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert import api
from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.reports import MergeReport
from dora_convert.errors import MismatchError

RANK, ALPHA, LAYERS = 4, 8, 2
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "initializer_range": 0.02}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": True}
SIZES = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
SIZES |= {"self_attn.o_proj": (64, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}


@dataclass
class Training:
    """Base, factors and magnitudes by module path, and the weights that they make."""

    root: Path
    sizes: dict[str, tuple[int, int]] = field(default_factory=lambda: SIZES)
    dim: int = 1
    spread: float = 0.3
    drift: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        names = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in self.sizes]
        self.base, self.down, self.up, self.m = {}, {}, {}, {}
        for path in names:
            out, inner = self.sizes[path.split(".", 3)[3]]
            rows = (self.normal(out, 1) * self.spread).exp()
            columns = (self.normal(1, inner) * self.spread).exp()
            self.base[path] = (self.normal(out, inner) * 0.1 * rows * columns).float().double()
            self.down[path] = self.normal(RANK, inner) * 0.02
            self.up[path] = self.normal(out, RANK) * 0.1
            norms = self.base[path].norm(dim=self.dim)
            self.m[path] = norms * (1 + self.drift * self.normal(len(norms)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def v(self, path: str) -> Tensor:
        return self.base[path] + ALPHA / RANK * self.up[path] @ self.down[path]

    def expected(self, path: str) -> Tensor:
        v = self.v(path)
        return self.m[path].unsqueeze(self.dim) * v / v.norm(dim=self.dim, keepdim=True)

    def write(
        self, m: Callable[[str], Tensor] | None = None, key: str = "lora_magnitude_vector"
    ) -> Training:
        """PEFT's files, with other magnitudes if a trainer writes others."""
        tensors = {}
        for path in self.base:
            name = f"base_model.model.{path}"
            tensors[f"{name}.lora_A.weight"] = self.down[path]
            tensors[f"{name}.lora_B.weight"] = self.up[path]
            tensors[f"{name}.{key}"] = m(path) if m else self.m[path]
        base = {f"{path}.weight": w.float() for path, w in self.base.items()}
        for folder, config, held in (("base", CONFIG, base), ("adapter", PEFT, tensors)):
            (self.root / folder).mkdir()
            file = "model" if folder == "base" else "adapter_model"
            full = {n: t.float().contiguous() for n, t in held.items()}
            save_file(full, self.root / folder / f"{file}.safetensors")
            name = "config" if folder == "base" else "adapter_config"
            (self.root / folder / f"{name}.json").write_text(json.dumps(config))
        return self

    def merge(self, **options: object) -> MergeReport:
        read = api.ReadOptions(**options)  # type: ignore[arg-type]
        return api.merge(
            self.root / "adapter", self.root / "out", base=self.root / "base", options=read
        )

    def check(self) -> None:
        merged = load_file(self.root / "out" / "model.safetensors")
        for path in self.base:
            expected = self.expected(path)
            error = (merged[f"{path}.weight"].double() - expected).norm()
            assert error <= 1e-6 * expected.norm(), path


def told(report: MergeReport) -> str:
    return " ".join(report.notes)


SQUARE = {"self_attn.q_proj": (64, 64), "self_attn.o_proj": (64, 64)}


def row_vectors(training: Training) -> Training:
    return training.write(lambda path: training.m[path].unsqueeze(0))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_axis_of_square_weights(tmp_path: Path, dim: int, seed: int) -> None:
    training = row_vectors(Training(tmp_path, SQUARE, dim=dim, seed=seed))
    report = training.merge()
    training.check()
    assert f"one per {'output' if dim else 'input'}, by their correlation" in told(report)


@pytest.mark.parametrize("dim", [0, 1])
def test_axis_where_rows_hardly_differ(tmp_path: Path, dim: int) -> None:
    """Norms of rows of equal entries differ by chance alone: the worst case."""
    sizes = {"self_attn.q_proj": (256, 256), "self_attn.o_proj": (256, 256)}
    training = row_vectors(Training(tmp_path, sizes, dim=dim, spread=0.0, drift=0.03))
    training.merge()
    training.check()


@pytest.mark.parametrize("seed", range(3))
def test_axis_that_the_base_does_not_tell(tmp_path: Path, seed: int) -> None:
    training = Training(tmp_path, SQUARE, spread=0.0, drift=0.0, seed=seed)
    training.m = {p: 1 + 0.1 * training.normal(64) for p in training.m}
    row_vectors(training)
    with pytest.raises(MismatchError, match="all weights are square") as caught:
        training.merge()
    assert "--axis out or --axis in" in caught.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.raises(MismatchError, match="all weights are square"):
        api.inspect(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.parametrize("axis", MagnitudeAxis)
def test_axis_that_the_user_says(tmp_path: Path, axis: MagnitudeAxis) -> None:
    """Against all evidence."""
    dim = 1 if axis is MagnitudeAxis.OUT else 0
    training = Training(tmp_path, SQUARE, dim=1 - dim)
    row_vectors(training).merge(axis=axis)
    training.dim = dim
    training.check()


def test_another_use_case_decides_the_same(tmp_path: Path) -> None:
    training = row_vectors(Training(tmp_path, SQUARE, dim=0))
    training.merge()
    found = api.verify(tmp_path / "out", adapter=tmp_path / "adapter", base=tmp_path / "base")
    assert not found.differences
    seen = api.inspect(tmp_path / "adapter", base=tmp_path / "base")
    assert {axis for group in seen.groups for axis in group.axes} == {"in"}


def test_factors_instead_of_norms(tmp_path: Path) -> None:
    """TensorRT-LLM's normalize_weights.py: m / ||V|| under the same name."""
    training = Training(tmp_path)
    training.write(lambda path: training.m[path] / training.v(path).norm(dim=1))
    report = training.merge()
    training.check()
    assert "normalize_weights.py" in told(report)
    assert "may not be the base" not in told(report)


def test_factors_of_a_strong_update(tmp_path: Path) -> None:
    """All near 1, and yet smaller where rows are short: they are not lengths for that."""
    training = Training(tmp_path, drift=0.002)
    training.up = {path: 4 * up for path, up in training.up.items()}
    factors = {p: training.m[p] / training.v(p).norm(dim=1) for p in training.m}
    norms = {p: w.norm(dim=1) for p, w in training.base.items()}
    logs = [torch.stack([factors[p].log(), norms[p].log()]) for p in norms]
    assert sum(float(torch.corrcoef(pair)[0, 1]) for pair in logs) / len(logs) > 0.4
    report = training.write(lambda path: factors[path]).merge()
    training.check()
    assert "normalize_weights.py" in told(report)


def test_factors_under_the_names_of_the_reference(tmp_path: Path) -> None:
    """The same of NVIDIA's own adapter, its update made as small as one that training makes.

    Layers with a magnitude alone that script refuses.
    """
    case = Path(__file__).parents[2] / "fixtures" / "nvidia"
    held = torch.load(case / "adapter" / "adapter_model.bin", weights_only=True)
    config = json.loads((case / "adapter" / "adapter_config.json").read_text())
    base = load_file(case / "base" / "model.safetensors")
    prefix, suffix = "base_model.model.", ".weight_m_wdecomp.weight"
    kept, expected = {}, {}
    for name in [n for n in held if n.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        down, up = held[path + ".lora_A.weight"], held[path + ".lora_B.weight"] / 4
        key = path.removeprefix(prefix) + ".weight"
        update = config["lora_alpha"] / config["r"] * up.double() @ down.double()
        v = base[key].double() + update
        factor = base[key].double().norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True)
        kept |= {name: down, f"{path}.lora_B.weight": up, path + suffix: factor.float()}
        expected[key] = factor.float().double() * v
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save(kept, adapter / "adapter_model.bin")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    read = api.ReadOptions(allow_pickle=True)
    report = api.merge(adapter, tmp_path / "out", base=case / "base", options=read)
    assert "normalize_weights.py" in told(report)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert len(expected) == 6
    for key, tensor in expected.items():
        assert torch.equal(merged[key], tensor.to(merged[key].dtype)), key


def test_norms_that_one_process_took(tmp_path: Path) -> None:
    """Megatron with two tensor-parallel processes: o_proj and down_proj are cut along inputs."""
    training = Training(tmp_path)
    half = {p: w[:, : w.shape[1] // 2].norm(dim=1) for p, w in training.base.items()}
    local = ("o_proj", "down_proj")
    training.write(lambda path: (half if path.endswith(local) else training.m)[path])
    with pytest.raises(MismatchError, match="2 tensor-parallel processes") as caught:
        training.merge()
    assert len(caught.value.problems) == 4
    training.merge(exclude=("*.o_proj", "*.down_proj"))


def test_magnitudes_of_a_new_layer(tmp_path: Path) -> None:
    """mlx-lm before August 2024: genuine, though nothing like the base."""
    training = Training(tmp_path)
    for path, weight in training.base.items():
        new = torch.rand(weight.shape, generator=training.random, dtype=torch.float64)
        training.m[path] = ((2 * new - 1) / math.sqrt(weight.shape[1])).norm(dim=1)
    report = training.write().merge()
    training.check()
    assert "near 0.577" in told(report)


def test_magnitudes_of_a_new_model(tmp_path: Path) -> None:
    """NeMo 2's exporter: norms of what transformers had just initialised."""
    training = Training(tmp_path)
    training.write(lambda path: (training.normal(*training.base[path].shape) * 0.02).norm(dim=1))
    with pytest.raises(MismatchError, match="only just initialised"):
        training.merge()


def test_magnitudes_that_were_not_trained(tmp_path: Path) -> None:
    training = Training(tmp_path, drift=0.0)
    report = training.write().merge()
    training.check()
    assert "were not trained" in told(report)


def test_magnitudes_of_a_sound_training(tmp_path: Path) -> None:
    training = Training(tmp_path)
    assert training.write().merge().notes == ()
    training.check()


def test_magnitudes_in_torchtunes_order(tmp_path: Path) -> None:
    """Its export after someone has set use_dora, so that PEFT loads it: only the norms tell."""
    training = Training(tmp_path)

    def stored(path: str) -> Tensor:
        m = training.m[path]
        if not path.endswith(("q_proj", "k_proj")):
            return m
        return m.reshape(-1, 2, 8).transpose(1, 2).reshape(-1)

    report = training.write(stored).merge()
    training.check()
    assert "magnitudes of 4 q and k modules put into the base's order" in told(report)


def test_magnitudes_of_another_base(tmp_path: Path) -> None:
    """Nothing is set right that is merely wrong: it is told, and merged as it is."""
    training = Training(tmp_path)
    training.m = {p: m.roll(3) for p, m in training.m.items()}
    report = training.write().merge()
    training.check()
    assert "may not be the base" in told(report)
    assert "put into the base's order" not in told(report)
