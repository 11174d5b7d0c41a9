"""FP8 of image models: every element times its scale, by the definition in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert import api
from dora_convert.api.bases import open_base
from dora_convert.api.reading import ReadOptions
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError
from dora_convert.execution.decoding import open_reader
from tests.oracles.models import merged_by_formula

Q = "blocks.0.attn.to_q"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def codes(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) / 8


def opened(folder: Path, **stored: Tensor) -> dict[str, Tensor]:
    save_file({name.replace("__", "."): t for name, t in stored.items()},
              folder / "model.safetensors")  # fmt: skip
    base, reader = open_base(folder, ReadOptions()), open_reader()
    assert base.schemes == ("scaled_fp8",)
    assert base.config == {}
    out = {}
    for name, ref in base.tensors.items():
        out[name] = reader.load(ref)
        if len(ref.spec.shape) == 2:
            with reader.rows(ref) as rows:
                parts = [rows.read(i, i + 1, torch.empty(0)) for i in range(ref.spec.shape[0])]
            assert torch.equal(torch.cat(parts).to(out[name].dtype), out[name]), name
    return out


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_bare(dtype: torch.dtype, tmp_path: Path) -> None:
    """Biases and kernels too; in the type that image models are computed in."""
    stored = {"a__weight": codes(6, 8, dtype=dtype), "a__bias": codes(6, dtype=dtype),
              "c__weight": codes(4, 3, 2, 2, dtype=dtype), "n__weight": torch.ones(3)}  # fmt: skip
    got = opened(tmp_path, **stored)
    assert got.keys() == {name.replace("__", ".") for name in stored}
    for name, tensor in stored.items():
        dense = got[name.replace("__", ".")]
        assert dense.dtype is (torch.float32 if name == "n__weight" else torch.bfloat16)
        assert dense.shape == tensor.shape
        assert torch.equal(dense.double(), tensor.double())  # bfloat16 holds all of FP8


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,), (6, 4, 1)])
def test_scaled(shape: tuple[int, ...], tmp_path: Path) -> None:
    """One for the tensor (ComfyUI), for each row, and for blocks of a row (musubi)."""
    weight, scale = codes(6, 8), scales(*shape)
    got = opened(tmp_path, a__weight=weight, a__scale_weight=scale, a__bias=torch.ones(6),
                 a__scale_input=torch.ones(()), scaled_fp8=torch.empty(0, dtype=E4M3))  # fmt: skip
    assert got.keys() == {"a.weight", "a.bias"}
    rows = scale.double().reshape(1, 1) if scale.numel() == 1 else scale.double().view(6, -1)
    exact = weight.double() * rows.repeat_interleave(8 // rows.shape[1], dim=1)
    assert torch.equal(got["a.weight"], exact.bfloat16())


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"a__scale_weight": torch.ones(5)}, "with a scale F32 [5] is not known"),
        ({"a__scale_weight": torch.ones(6, 3)}, "with a scale F32 [6, 3] is not known"),
        ({"a__weight_scale": torch.ones(())}, "what weight_scale says of it is not known"),
        ({"a__weight_scale_inv": torch.ones(1, 1)}, "what weight_scale_inv says"),
        ({"a__comfy_quant": torch.ones(9).byte()}, "what comfy_quant says of it is not known"),
    ],
)
def test_refused(beside: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path, a__weight=codes(6, 8), **beside)
    assert words in "".join(caught.value.problems)


def test_a_config_that_speaks_is_believed(tmp_path: Path) -> None:
    """FP8 weights of a scheme of language models are not taken for bare ones."""
    save_file({"a.weight": codes(128, 128)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        open_base(tmp_path, ReadOptions())
    assert "a.weight: weight_scale_inv is missing" in caught.value.problems


def test_a_merge_by_the_formula(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    base.mkdir()
    adapter.mkdir()
    weight, scale = codes(16, 8), scales(1)
    save_file(
        {f"{Q}.weight": weight, f"{Q}.scale_weight": scale, "scaled_fp8": codes(2)},
        base / "model.safetensors",
    )
    generator = torch.Generator().manual_seed(4)
    dense = weight.double() * scale.double()
    trained = {
        "lora_A.weight": torch.randn(2, 8, generator=generator) / 8,
        "lora_B.weight": torch.randn(16, 2, generator=generator) / 8,
        "lora_magnitude_vector": dense.norm(dim=1).float() * 1.03,
    }
    tensors = {f"base_model.model.{Q}.{name}": tensor for name, tensor in trained.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 4,
              "target_modules": ["to_q"]}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    api.merge(adapter, out, base=base, how=api.MergeOptions(dtype=DType.F32))
    api.verify(out, adapter=adapter, base=base, samples=None)
    got = load_file(out / "model.safetensors")
    assert got.keys() == {f"{Q}.weight"}
    exact = merged_by_formula(Q, dense, tensors, scaling=2.0)
    assert (got[f"{Q}.weight"].double() - exact).abs().max() < 2e-7
    assert not (out / "config.json").exists()
