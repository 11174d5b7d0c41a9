"""Every layout that trainers are known to write, read by nothing but a description of it.

The weights that must come out are the producer's own. Where a layout is known and no file of it is
at hand, a stored adapter is moved into it here, so that its expected weights still hold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_convert import api
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError

FIXTURES = Path(__file__).parents[2] / "fixtures"
PEFT = FIXTURES / "peft" / "llama_qv"
NVIDIA = FIXTURES / "nvidia"
CONFIG = 'config = "adapter_config.json"\nscale = { alpha = "lora_alpha", rank = "r" }\n'
MODULE = "base_model.model."


@dataclass(frozen=True)
class Case:
    """An adapter in a layout, its base, and the merged weights by name."""

    spec: str
    adapter: Path
    base: Path
    expected: Mapping[str, Tensor]
    tolerance: float = 1e-6


def parts(down: str, up: str, magnitude: str, *others: str) -> str:
    return "\n".join(
        ["[tensors]", f"down = {down}", f"up = {up}", f"magnitude = {magnitude}", *others, ""]
    )


def named(name: str, shape: str, *others: str) -> str:
    return "{ " + ", ".join([f'name = "{{module}}.{name}"', f"shape = {shape}", *others]) + " }"


def expected_of(folder: Path) -> dict[str, Tensor]:
    changed = load_file(folder / "expected.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    return {n: t for n, t in changed.items() if n in base and not torch.equal(t, base[n])}


# NVIDIA's reference, as it is and in the layouts that others make of it


def nvidia() -> tuple[dict[str, Tensor], Any, dict[str, Tensor]]:
    tensors = torch.load(NVIDIA / "adapter" / "adapter_model.bin", weights_only=True)
    config = json.loads((NVIDIA / "adapter" / "adapter_config.json").read_text())
    merged = torch.load(NVIDIA / "reference_merge.pt", weights_only=True)
    return tensors, config, merged


NVIDIA_SPEC = (
    'prefix = "base_model.model."\nmagnitude_only = true\nweights = "adapter_model.bin"\n'
    'files = ["adapter_model.bin", "non_lora_trainables.bin"]\n' + CONFIG
)
NVIDIA_PARTS = parts(
    '"{module}.lora_A[.default].weight"',
    '"{module}.lora_B[.default].weight"',
    named("weight_m_wdecomp[.default].weight", '["out", 1]'),
)
FP16 = 2e-3  # it rounds some steps on the way


def nvidia_commonsense(folder: Path) -> Case:
    adapter = NVIDIA / "adapter"
    return Case(NVIDIA_SPEC + NVIDIA_PARTS, adapter, NVIDIA / "base", nvidia()[2], FP16)


def nvidia_llava(folder: Path) -> Case:
    """Magnitudes in a second file, under the adapter's name."""
    tensors, config, merged = nvidia()
    split: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, tensor in tensors.items():
        inserted = name.replace(".weight_m_wdecomp.", ".weight_m_wdecomp.default.")
        split[inserted != name][inserted] = tensor
    torch.save(split[0], folder / "adapter_model.bin")
    torch.save(split[1], folder / "non_lora_trainables.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return Case(NVIDIA_SPEC + NVIDIA_PARTS, folder, NVIDIA / "base", merged, FP16)


def tensorrt_llm(folder: Path) -> Case:
    """Magnitudes that were divided by ||V|| under the same name, and flattened."""
    tensors, config, merged = nvidia()
    base = load_file(NVIDIA / "base" / "model.safetensors")
    for name in [n for n in tensors if "weight_m_wdecomp" in n]:
        path = name.removesuffix(".weight_m_wdecomp.weight")
        v = base[path.removeprefix(MODULE) + ".weight"].double()
        if f"{path}.lora_A.weight" in tensors:
            down, up = (tensors[f"{path}.lora_{x}.weight"].double() for x in "AB")
            v = v + config["lora_alpha"] / config["r"] * up @ down
        tensors[name] = (tensors[name].double().flatten() / v.norm(dim=1)).float()
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    spec = NVIDIA_SPEC + NVIDIA_PARTS.replace('["out", 1]', '["out"], values = "factor"')
    return Case(spec, folder, NVIDIA / "base", merged, FP16)


# PEFT's own file, and PEFT's case moved to other names and shapes


PEFT_SPEC = (
    'prefix = "base_model.model."\n'
    + CONFIG
    + parts(
        '"{module}.lora_A.weight"',
        '"{module}.lora_B.weight"',
        named("lora_magnitude_vector[.weight]", '["out"]'),
    )
)


def peft(folder: Path) -> Case:
    return Case(PEFT_SPEC, PEFT / "adapter", PEFT / "base", expected_of(PEFT))


def moved(
    folder: Path, spec: str, names: Mapping[str, str], turn: Callable[[str, Tensor], Tensor]
) -> Case:
    """PEFT's case under other names; `turn` reshapes the tensor of a part, "a", "b" or "m"."""
    tensors = {}
    for name, tensor in load_file(PEFT / "adapter" / "adapter_model.safetensors").items():
        path, _, leaf = name.removeprefix(MODULE).partition(".lora_")
        part = leaf[0].lower()
        tensors[f"{path}.{names[part]}"] = turn(part, tensor).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    shutil.copy(PEFT / "adapter" / "adapter_config.json", folder)
    return Case(spec, folder, PEFT / "base", expected_of(PEFT))


def keras_hub(folder: Path) -> Case:
    spec = CONFIG + parts(
        named("lora_a", '["in", "rank"]'),
        named("lora_b", '["rank", "out"]'),
        named("magnitude", '["out"]'),
    )
    names = {"a": "lora_a", "b": "lora_b", "m": "magnitude"}
    return moved(folder, spec, names, lambda part, t: t if part == "m" else t.T)


def mlora(folder: Path) -> Case:
    """[1, n] does not prove a magnitude per input."""
    spec = CONFIG + parts(
        '"{module}.lora_a"', '"{module}.lora_b"', named("magnitude_vector", '[1, "out"]')
    )
    names = {"a": "lora_a", "b": "lora_b", "m": "magnitude_vector"}
    return moved(folder, spec, names, lambda part, t: t[None] if part == "m" else t)


def undeclared_axis(folder: Path) -> Case:
    """The description does not know; the layers that are not square do."""
    spec = CONFIG + parts('"{module}.a"', '"{module}.b"', '"{module}.m"')
    return moved(folder, spec, {"a": "a", "b": "b", "m": "m"}, lambda _, t: t)


# torchtune's own file and its export, for the two families that keep rows differently

ROWS = """[[rows]]
modules = ["{module}.q_proj", "{module}.k_proj"]
"""
TORCHTUNE = (
    'weights = "adapter_model.pt"\nbias = "scaled"\n'
    + CONFIG
    + parts('"{module}.lora_a.weight"', '"{module}.lora_b.weight"', named("magnitude", '["out"]'))
    + """[rename]
"layers.{i}.attn.output_proj" = "model.layers.{i}.self_attn.o_proj"
"layers.{i}.attn.{p}" = "model.layers.{i}.self_attn.{p}"
"layers.{i}.mlp.w1" = "model.layers.{i}.mlp.gate_proj"
"layers.{i}.mlp.w2" = "model.layers.{i}.mlp.down_proj"
"layers.{i}.mlp.w3" = "model.layers.{i}.mlp.up_proj"
"""
)


def torchtune(family: str, file: str, spec: str) -> Case:
    folder = FIXTURES / "torchtune" / family
    expected = load_file(folder / "reference_merge.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    # Its merge leaves the biases as they are, against its forward.
    changed = {
        n: t for n, t in expected.items() if n.endswith("proj.weight") and not base[n].equal(t)
    }
    return Case(spec, folder / "adapter" / file, folder / "base", changed, 2e-6)


def torchtune_llama(folder: Path) -> Case:
    spec = TORCHTUNE + ROWS + 'up = "interleaved"\nmagnitude = "interleaved"\n'
    return torchtune("llama", "adapter_model.pt", spec)


def torchtune_qwen2(folder: Path) -> Case:
    return torchtune("qwen2", "adapter_model.pt", TORCHTUNE)


EXPORT = f'bias = "scaled"\n{PEFT_SPEC}{ROWS}'


def torchtune_llama_export(folder: Path) -> Case:
    spec = EXPORT + 'magnitude = "interleaved"\n'
    return torchtune("llama", "adapter_model.safetensors", spec)


def torchtune_qwen2_export(folder: Path) -> Case:
    return torchtune("qwen2", "adapter_model.safetensors", EXPORT + 'magnitude = "interleaved"\n')


# Megatron's layers that are not fused


def megatron(folder: Path) -> Case:
    spec = (
        'config = "adapter_config.json"\nscale = { alpha = "alpha", rank = "dim" }\n'
        'ignore = ["{module}.linear_qkv.adapter.{a}[.{b}]", "{module}.linear_fc1.{a}.{b}[.{c}]"]\n'
        + parts(
            '"{module}.adapter.linear_in.weight"',
            '"{module}.adapter.linear_out.weight"',
            named("adapter.weight_magnitude", '["out"]'),
        )
        + """[rename]
"decoder.layers.{i}.self_attention.linear_proj" = "model.layers.{i}.self_attn.o_proj"
"decoder.layers.{i}.mlp.linear_fc2" = "model.layers.{i}.mlp.down_proj"
"""
    )
    held = FIXTURES / "megatron"
    ends = ("o_proj.weight", "down_proj.weight")
    expected = {
        n: t for n, t in load_file(held / "expected.safetensors").items() if n.endswith(ends)
    }
    return Case(spec, held / "adapter", held / "base", expected)


# Small reimplementations


def small(folder: Path, name: str, path: str, file: str, spec: str) -> Case:
    held = torch.load(FIXTURES / "small" / f"{name}.fixture.pt", weights_only=True)
    adapter, base = folder / "adapter", folder / "base"
    adapter.mkdir()
    base.mkdir()
    layer = {f"{path}.{leaf}": t for leaf, t in held["base"].items() if t is not None}
    save_file(layer, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "mine"}')
    if file.endswith(".safetensors"):
        save_file(held["adapter"], adapter / file)
    else:
        torch.save(held["adapter"], adapter / file)
    expected = {f"{path}.weight": held["eff_weight"]}
    if f"{path}.bias" in layer:
        expected[f"{path}.bias"] = held["eff_bias"]
    return Case(spec, adapter, base, expected)


Q = "model.layers.0.self_attn.q_proj"
FSDP = 'weights = "model_state_dict.safetensors"\nscale = 1.0\nbias = "scaled"\n' + parts(
    '"{module}.dora_layer.lora_A.weight"',
    '"{module}.dora_layer.lora_B.weight"',
    named("magnitude_layer.magnitude", '["out"]'),
)


def fsdp_qlora(folder: Path) -> Case:
    return small(folder, "fsdp_qlora_bias0", Q, "model_state_dict.safetensors", FSDP)


def fsdp_qlora_with_bias(folder: Path) -> Case:
    return small(folder, "fsdp_qlora_bias1", Q, "model_state_dict.safetensors", FSDP)


def fsdp_qlora_for_vllm(folder: Path) -> Case:
    """What its branch for vLLM packs: `.rescale` is m / ||V||."""
    case = fsdp_qlora_with_bias(folder)
    held = load_file(case.adapter / "model_state_dict.safetensors")
    down, up, m = (
        held[f"{Q}.{x}"].double()
        for x in (
            "dora_layer.lora_A.weight",
            "dora_layer.lora_B.weight",
            "magnitude_layer.magnitude",
        )
    )
    base = load_file(case.base / "model.safetensors")[f"{Q}.weight"].double()
    packed = {"lora_A": down, "lora_B": up, "rescale": m / (base + up @ down).norm(dim=1)}
    (case.adapter / "model_state_dict.safetensors").unlink()
    save_file({f"{Q}.{n}": t.float() for n, t in packed.items()}, case.adapter / "p.safetensors")
    spec = 'weights = "p.safetensors"\nscale = 1.0\nbias = "scaled"\n' + parts(
        '"{module}.lora_A"', '"{module}.lora_B"', named("rescale", '["out"]', 'values = "factor"')
    )
    return Case(spec, case.adapter, case.base, case.expected)


def shipped(name: str) -> str:
    root = Path(api.__file__).parents[1] / "formats"
    return (root / f"{name}.toml").read_text()


def catid(folder: Path) -> Case:
    return small(folder, "catid", "layer1", "model.pt", shipped("catid"))


def rasbt(folder: Path) -> Case:
    return small(folder, "rasbt", "layers.0", "model.pt", f"scale = 4.0\n{shipped('rasbt')}")


def vlt5(folder: Path) -> Case:
    path = "encoder.layers.0.self_attn.q_proj"
    return small(folder, "vlt5_DoraLinear", path, "LAST.pth", shipped("vlt5"))


def mlx(folder: Path) -> Case:
    held = FIXTURES / "mlx"
    expected = load_file(held / "linear" / "reference_merge.safetensors")
    # mlx-lm rounds the update to bfloat16 on the way.
    return Case(shipped("mlx"), held / "linear", held / "base", expected, 5e-3)


CASES: tuple[Callable[[Path], Case], ...] = (
    *(nvidia_commonsense, nvidia_llava, tensorrt_llm),
    *(peft, keras_hub, mlora, undeclared_axis),
    *(torchtune_llama, torchtune_qwen2, torchtune_llama_export, torchtune_qwen2_export, megatron),
    *(fsdp_qlora, fsdp_qlora_with_bias, fsdp_qlora_for_vllm, catid, rasbt, vlt5, mlx),
)


@pytest.mark.parametrize("make", CASES, ids=[make.__name__ for make in CASES])
def test_layout(make: Callable[[Path], Case], tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    case = make(files)
    spec = tmp_path / "my_format.toml"
    spec.write_text(case.spec)
    options = api.ReadOptions(spec=spec, allow_pickle=True)
    how = api.MergeOptions(dtype=DType.F32)
    api.merge(case.adapter, tmp_path / "out", base=case.base, options=options, how=how)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(case.base / "model.safetensors")
    assert case.expected
    changed = {name for name in base if not torch.equal(merged[name], base[name].float())}
    for name, tensor in case.expected.items():
        wanted = tensor.double()
        assert (merged[name].double() - wanted).norm() <= case.tolerance * wanted.norm(), name
    weights = {name for name in changed if name.endswith(".weight")}
    assert weights == {name for name in case.expected if name.endswith(".weight")}


def test_description_at_odds_with_the_files(tmp_path: Path) -> None:
    """A factor taken for transposed is refused, not merged into something."""
    spec = tmp_path / "my_format.toml"
    spec.write_text(
        PEFT_SPEC.replace('"{module}.lora_A.weight"', named("lora_A.weight", '["in", "rank"]'))
    )
    with pytest.raises(InputError) as caught:
        api.merge(
            PEFT / "adapter",
            tmp_path / "out",
            base=PEFT / "base",
            options=api.ReadOptions(spec=spec),
        )
    assert all("the ranks disagree" in problem for problem in caught.value.problems)
    assert len(caught.value.problems) == 4
