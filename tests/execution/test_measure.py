"""Figures of whole modules, block by block, against numpy in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dora_convert.core.adapter import DoraModule, MagnitudeAxis
from dora_convert.core.plan import Merge, Piece
from dora_convert.core.tensors import DType
from dora_convert.execution import measure
from dora_convert.execution.measure import figures, module_sums, storage_label

from .conftest import Store, module, operands, plan_of, random


@pytest.mark.parametrize("axis", MagnitudeAxis)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures(
    store: Store, monkeypatch: pytest.MonkeyPatch, axis: MagnitudeAxis, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(measure, "_BLOCK", 500)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=generator).to(dtype)
    up, down = torch.randn(40, 3, generator=generator), torch.randn(3, 24, generator=generator)
    norm_axis = 1 if axis is MagnitudeAxis.OUT else 0
    w = weight.double().numpy()
    norms = np.linalg.norm(w, axis=norm_axis)
    m = torch.from_numpy(norms * np.linspace(0.9, 1.2, len(norms))).float()
    refs = store("adapter.safetensors", up=up, down=down, m=m)
    op = Merge(store(w=weight)["w"], (Piece(0, 40, module(refs, axis)),))
    kind = DType.F32 if dtype is torch.float32 else DType.BF16
    plan = plan_of({"w": (op, kind, (40, 24))})

    sums = module_sums(plan, workers=2)
    found = figures([sums["layer"]], storage_label(plan))

    v = w + 0.5 * up.double().numpy() @ down.double().numpy()
    lengths = np.linalg.norm(v, axis=norm_axis, keepdims=True)
    scale = np.expand_dims(m.double().numpy(), norm_axis)
    effect = scale * v / lengths - w
    rounded = torch.from_numpy(effect + w).bfloat16().double().numpy() - w
    logs = np.log(m.double().numpy() / norms)
    cosine = (w * v).sum(axis=norm_axis) / norms / lengths.squeeze()
    size = np.linalg.norm
    expected = {
        "update": size(v - w) / size(w),
        "effect": size(effect) / size(w),
        "magnitude_shift": np.abs(m.double().numpy() - norms).mean() / norms.mean(),
        "magnitude_bias": logs.mean(),
        "magnitude_spread": logs.std(),
        "direction_shift": (1 - cosine).mean(),
        "rounding_loss": size(rounded - effect) / size(effect),
        "kept": (rounded * effect).sum() / (effect * effect).sum(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-3), name
    assert found.stored_as == "bfloat16"


def test_a_column_of_zeros_does_not_count(store: Store) -> None:
    """Without it, the figures are those of a matrix that has one column less."""
    generator = torch.Generator().manual_seed(0)
    weight, m = torch.randn(40, 24, generator=generator), torch.rand(24, generator=generator)
    kept = torch.arange(24) != 7
    seen = []
    for name, w, given in (
        ("whole", weight * kept, m * kept),
        ("less", weight[:, kept].clone(), m[kept].clone()),
    ):
        refs = store(f"{name}-adapter.safetensors", m=given)
        layer = DoraModule("layer", None, refs["m"], MagnitudeAxis.IN, 1.0)
        base = store(f"{name}.safetensors", w=w)["w"]
        plan = plan_of({"w": (Merge(base, (Piece(0, 40, layer),)), DType.F32, w.shape)})
        seen.append(module_sums(plan, workers=1)["layer"])
    assert seen[0].rows == 23
    assert seen[0].effect == pytest.approx(seen[1].effect, rel=1e-6)
    assert seen[0].kept == pytest.approx(seen[1].kept, rel=1e-6)


GROWTH = """
import resource, sys
from pathlib import Path
from dora_convert.api.inspecting import inspect

def highest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small, large = map(Path, sys.argv[1:])
inspect(small / "adapter", base=small / "base")
before = highest()
inspect(large / "adapter", base=large / "base")
print(highest() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_does_not_grow_with_an_embedding(tmp_path: Path) -> None:
    """Norms over its rows, 64 MiB as stored: the columns are never gathered."""
    folders = [tmp_path / "small", tmp_path / "large"]
    for folder, rows in zip(folders, (64, 1 << 15), strict=True):
        write_embedding(folder, rows, 1024)
    command = [sys.executable, "-c", GROWTH, *folders]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 64 << 10  # KiB


def write_embedding(folder: Path, rows: int, columns: int) -> None:
    """A base of one embedding, and a DoRA of it in PEFT's layout."""
    generator = torch.Generator().manual_seed(0)
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    save_file({"model.embed_tokens.weight": weight}, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    key = "base_model.model.model.embed_tokens."
    tensors = {
        key + "lora_embedding_A": torch.randn(4, rows, generator=generator),
        key + "lora_embedding_B": torch.randn(columns, 4, generator=generator) * 0.01,
        key + "lora_magnitude_vector": weight.float().norm(dim=0),
    }
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8}
    config["target_modules"] = ["embed_tokens"]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def test_sums_do_not_depend_on_which_part_is_ready_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats added in another order are another sum."""
    refs = store("adapter.safetensors", **operands(30, 24, MagnitudeAxis.OUT))
    names = [f"w{i}" for i in range(5)]
    bases = store(**{name: random(30, 24, seed=i) * 10**i for i, name in enumerate(names)})
    jobs = {
        name: (Merge(bases[name], (Piece(0, 30, module(refs)),)), DType.F32, (30, 24))
        for name in names
    }
    plan = plan_of(jobs)
    expected = module_sums(plan, workers=1)
    for order in ((4, 3, 2, 1, 0), (2, 4, 0, 3, 1)):

        def run(work: Sequence[int], do: Callable[[int], None], workers: int) -> None:
            for i in order:  # noqa: B023
                do(work[i])

        monkeypatch.setattr(measure, "in_threads", run)
        assert module_sums(plan, workers=1) == expected


def test_no_module_no_figures() -> None:
    nothing = figures([], "bfloat16")
    assert nothing.update == nothing.kept == nothing.magnitude_spread == 0.0
