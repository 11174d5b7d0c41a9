"""The formats that are descriptions, each against what its own producer computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert import api
from dora_convert.core.adapter import Adapter, BiasRule, LayerKind, MagnitudeAxis
from dora_convert.core.bundle import Bundle
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.errors import InputError
from dora_convert.formats import formats
from dora_convert.storage.bundle import open_bundle

from ..core.values import bundle, ref

FIXTURES = Path(__file__).parents[2] / "fixtures"
MLX = FIXTURES / "mlx"
PICKLE = api.ReadOptions(allow_pickle=True)


def read(name: str, held: Bundle, **others: Any) -> Adapter:
    return formats.get(name).read(held, **others)


def problems(name: str, held: Bundle) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        read(name, held)
    return caught.value.problems


# mlx-lm


def mlx_formula(case: str) -> dict[str, Tensor]:
    """`m * V / ||V||` per row of the stored weight in float64, for linear layers and embeddings."""
    base, held = load_file(MLX / "base" / "model.safetensors"), load_file(MLX / case / FILE)
    found = {}
    for path in {name.rpartition(".")[0] for name in held}:
        a, b, m = (held[f"{path}.{leaf}"].double() for leaf in ("lora_a", "lora_b", "m"))
        update = a @ b if path.endswith("embed_tokens") else (a @ b).T
        v = base[f"{path}.weight"].double() + 20.0 * update
        found[f"{path}.weight"] = m[:, None] * v / v.norm(dim=1, keepdim=True)
    return found


FILE = "adapters.safetensors"


@pytest.mark.parametrize("case", ["linear", "embedding"])
def test_mlx(case: str, tmp_path: Path) -> None:
    how = api.MergeOptions(dtype=DType.F32)
    api.merge(MLX / case, tmp_path / "out", base=MLX / "base", how=how)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(MLX / "base" / "model.safetensors")
    fused = load_file(MLX / case / "reference_merge.safetensors")
    exact = mlx_formula(case)
    assert exact.keys() == fused.keys()
    assert len(exact) == 3
    for name, value in exact.items():
        assert (merged[name].double() - value).norm() <= 1e-7 * value.norm(), name
        # Its own merge rounds the update and the sum to bfloat16 on the way.
        assert (fused[name].double() - value).norm() <= 5e-3 * value.norm(), name
        assert (base[name].double() - value).norm() > 0.1 * value.norm(), name
    for name in base.keys() - exact.keys():
        assert torch.equal(merged[name], base[name].float()), name


def test_mlx_embedding_is_per_token() -> None:
    found = read("mlx", open_bundle(MLX / "embedding")).modules
    module = found["model.embed_tokens"]
    assert (module.kind, module.axis) == (LayerKind.EMBEDDING, MagnitudeAxis.OUT)
    assert module.delta is not None
    assert module.delta.shape == (40, 32)
    assert found["lm_head"].kind is LayerKind.LINEAR


def test_mlx_without_a_magnitude_that_mlx_does_not_miss() -> None:
    path = "model.layers.1.self_attn.v_proj"
    assert problems("mlx", open_bundle(MLX / "no_m")) == (f"{path}: {path}.m is missing",)


def test_mlx_that_says_lora() -> None:
    (note,) = read("mlx", open_bundle(MLX / "as_lora")).notes
    assert note.startswith("adapter_config.json does not say that this is a DoRA")


def test_mlx_that_lost_all_magnitudes() -> None:
    held = open_bundle(MLX / "linear")
    plain = {name: t for name, t in held.tensors.items() if not name.endswith(".m")}
    (problem,) = problems("mlx", Bundle(held.root, plain, held.documents))
    assert problem.startswith("adapter_config.json says that this is a DoRA, but none of the 3")
    lora = {"adapter_config.json": {"fine_tune_type": "lora", "lora_parameters": {"scale": 2}}}
    assert read("mlx", Bundle(held.root, plain, lora)).notes[0].startswith("plain LoRA")


@pytest.mark.parametrize(
    ("name", "config", "scaling"),
    [
        ("mlx", {"lora_parameters": {"scale": 20.0, "rank": 4}}, 20.0),
        # An alpha there is not read by mlx-lm.
        ("mlx", {"lora_parameters": {"scale": 20.0, "rank": 4, "alpha": 8}}, 20.0),
        # mlx-vlm, before it had lora_parameters
        ("mlx", {"rank": 4, "alpha": 8}, 2.0),
        # Unsloth
        ("mlx", {"peft_type": "LORA", "rank": 4, "scale": 3.0, "fine_tune_type": "dora"}, 3.0),
        (
            "mlx_examples",
            {"use_dora": True, "lora_parameters": {"scale": 10.0, "alpha": 16, "rank": 4}},
            40.0,
        ),
    ],
)
def test_mlx_configs(name: str, config: Any, scaling: float) -> None:
    held = bundle(open_bundle(MLX / "linear").tensors, config)
    assert [n for n in formats.names() if formats.get(n).detect(held)] == [name]
    assert {module.scaling for module in read(name, held).modules.values()} == {scaling}


def test_mlx_examples_began_with_other_magnitudes() -> None:
    parameters = {"scale": 10.0, "alpha": 16, "rank": 4}
    config = {"use_dora": True, "lora_parameters": parameters}
    (note,) = read("mlx_examples", bundle(open_bundle(MLX / "linear").tensors, config)).notes
    assert "about 0.577" in note


@pytest.mark.parametrize("config", [None, {}, {"lora_parameters": {"rank": 4}}])
def test_mlx_without_a_scale(config: Any) -> None:
    (problem,) = problems("mlx", bundle(open_bundle(MLX / "linear").tensors, config))
    assert "'lora_parameters.scale'" in problem


# Small reimplementations


SMALL = {
    # fixture -> path of the layer, file that its producer writes, scaling that no file holds
    "fsdp_qlora_bias0": ("model.layers.0.self_attn.q_proj", "model_state_dict.safetensors", None),
    "fsdp_qlora_bias1": ("model.layers.0.self_attn.q_proj", "model_state_dict.safetensors", None),
    "catid": ("layer1", "model.pt", None),
    "rasbt": ("layers.0", "model.pt", 4.0),
    "vlt5_DoraLinear": ("encoder.layers.0.self_attn.q_proj", "LAST.pth", None),
    "vlt5_DoraLinear_simple": ("encoder.layers.0.self_attn.q_proj", "LAST.pth", None),
}


def small(name: str) -> Any:
    return torch.load(FIXTURES / "small" / f"{name}.fixture.pt", weights_only=True)


def unpacked(name: str, folder: Path) -> tuple[Path, Path]:
    """The adapter's file, and a base of its one layer."""
    path, file, _ = SMALL[name]
    held = small(name)
    layer = {f"{path}.{leaf}": t for leaf, t in held["base"].items() if t is not None}
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file(layer, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "mine"}))
    if file.endswith(".safetensors"):
        save_file(held["adapter"], adapter / file)
    else:
        torch.save(held["adapter"], adapter / file)
    return adapter / file, base


@pytest.mark.parametrize("name", SMALL)
def test_producers_forward(name: str, tmp_path: Path) -> None:
    """The weight and the bias that the producer's layer really applies, by its own forward."""
    path, _, scale = SMALL[name]
    adapter, base = unpacked(name, tmp_path)
    options = api.ReadOptions(allow_pickle=True, scale=scale)
    api.merge(adapter, tmp_path / "out", base=base, options=options)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    held = small(name)
    expected = {f"{path}.weight": held["eff_weight"]}
    if held["base"]["bias"] is not None:
        expected[f"{path}.bias"] = held["eff_bias"]
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        assert (merged[key].double() - value.double()).abs().max() < 1e-6, key
    moved = held["eff_weight"].double() - held["base"]["weight"].double()
    assert moved.norm() > 0.05 * held["base"]["weight"].double().norm()


def test_fsdp_qlora_scales_the_bias_too() -> None:
    held = small("fsdp_qlora_bias1")
    assert (held["eff_bias"] - held["base"]["bias"]).abs().max() > 1e-2
    tensors = {name: tuple(t.shape) for name, t in held["adapter"].items()}
    found = read("fsdp_qlora", bundle(tensors, None))
    assert {m.bias_rule for m in found.modules.values()} == {BiasRule.SCALED}
    assert "dequantised base" in found.notes[0]


def test_fsdp_qlora_with_layer_norms() -> None:
    held = {name: tuple(t.shape) for name, t in small("fsdp_qlora_bias0")["adapter"].items()}
    norms = {"model.layers.0.input_layernorm.weight": (12,), "model.norm.weight": (12,)}
    assert read("fsdp_qlora", bundle(held | norms, None)).replaced.keys() == norms.keys()
    told = problems("fsdp_qlora", bundle(held | {"model.embed_tokens.weight": (40, 12)}, None))
    assert told == ("model.embed_tokens.weight [40, 12] is not understood",)


def test_rasbt_asks_for_its_alpha(tmp_path: Path) -> None:
    adapter, base = unpacked("rasbt", tmp_path)
    with pytest.raises(InputError, match="does not save what the update is multiplied") as caught:
        api.merge(adapter, tmp_path / "out", base=base, options=PICKLE)
    assert "--scale" in caught.value.hint


def early(out: int, inner: int) -> dict[str, TensorRef]:
    """rasbt's first class, whose `m` begins as `torch.ones(1, out)`."""
    shapes = {
        "m": (1, out),
        "lora.A": (inner, 3),
        "lora.B": (3, out),
        "linear.weight": (out, inner),
    }
    return {f"l.{name}": ref(f"l.{name}", *shape) for name, shape in shapes.items()}


def test_rasbt_first_class_is_no_linear_map() -> None:
    found = problems("rasbt", bundle(early(20, 12), None))
    assert any("early LinearWithDoRA" in problem and "not linear" in problem for problem in found)


# From one to another


def values(folder: Path) -> Mapping[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def converted(adapter: Path, out: Path, target: str) -> Path:
    api.convert(adapter, out, options=PICKLE, how=api.ConvertOptions(format=target))
    return out


@pytest.mark.parametrize("through", ["peft", "nvidia", "mlx"])
def test_mlx_there_and_back(through: str, tmp_path: Path) -> None:
    there = converted(MLX / "linear", tmp_path / "there", through)
    back = converted(there, tmp_path / "back", "mlx")
    before, after = values(MLX / "linear"), values(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((back / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "dora"
    assert config["lora_parameters"]["scale"] == 20.0
    assert config["lora_parameters"]["rank"] == 4


@pytest.mark.parametrize("case", ["llama_qv", "llama_all_sharded", "llama_bf16"])
def test_peft_to_mlx_and_back(case: str, tmp_path: Path) -> None:
    adapter = FIXTURES / "peft" / case / "adapter"
    back = converted(converted(adapter, tmp_path / "mlx", "mlx"), tmp_path / "peft", "peft")
    before, after = values(adapter), values(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_mlx_embedding_has_no_place_in_peft(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="PEFT's layout cannot hold") as caught:
        converted(MLX / "embedding", tmp_path / "out", "peft")
    assert any("model.embed_tokens" in problem for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fsdp_qlora_bias1", "catid", "vlt5_DoraLinear"])
def test_written_as_it_was(name: str, tmp_path: Path) -> None:
    adapter, _ = unpacked(name, tmp_path)
    target = {"fsdp_qlora_bias1": "fsdp_qlora", "vlt5_DoraLinear": "vlt5"}.get(name, name)
    out = converted(adapter, tmp_path / "out", target)
    (file,) = (f for f in out.iterdir() if f.name not in ("README.md", "SHA256SUMS"))
    again = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    before = small(name)["adapter"]
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)
