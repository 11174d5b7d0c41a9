"""QDoRA: adapters that PEFT trained on a base in bitsandbytes, merged with the 16-bit original."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dora_convert import api
from dora_convert.api.bases import open_base
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError
from dora_convert.execution.decoding import open_reader

from .models import Trained, quiet, tokens, train

CONFIGS: Mapping[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
MODULES = ["q_proj", "v_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    """Widths that are no multiple of a block of 64, so that blocks span rows."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=72,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=18,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(5)
    config = GPT2Config(vocab_size=96, n_embd=72, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Case:
    """`weights` are those that the library gives back, `[out, in]`, by module path."""

    trained: Trained
    weights: dict[str, Tensor]


def made(
    folder: Path, model: PreTrainedModel, scheme: str, modules: list[str], dtype: torch.dtype
) -> Case:
    with quiet():
        model.to(dtype).save_pretrained(folder / "base")
        loaded = AutoModelForCausalLM.from_pretrained(
            folder / "base",
            quantization_config=BitsAndBytesConfig(**CONFIGS[scheme]),
            device_map="cpu",
            dtype=dtype,
        )
    for module in loaded.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # With AVX-512 the library packs them anew at the first forward, if it fails not for
            # widths that are no multiple of 32.
            module.support_avx512bf16_for_cpu = False
    weights = {n: given_back(m.weight) for n, m in loaded.named_modules() if is_quantised(m)}
    trained = train(
        folder, loaded, tokens(), base=folder / "base", target_modules=modules, bias="none"
    )
    return Case(trained, weights)


def is_quantised(module: torch.nn.Module) -> bool:
    return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def given_back(weight: Any) -> Tensor:
    if isinstance(weight, bnb.nn.Params4bit):
        dense = decoded(weight.data, weight.quant_state)
    else:
        dense = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    result: Tensor = dense.double()
    return result


def decoded(packed: Tensor, state: Any) -> Tensor:
    """By the format's definition; of the library's own see the next test."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    flat = packed.view(torch.uint8).view(-1).long()
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(-1)
    dense = state.code[codes] * absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return dense.view(state.shape).to(state.dtype)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("columns", [64, 72, 96, 136, 288, 320])
def test_what_the_library_decodes(scheme: str, columns: int) -> None:
    """The same, but for a fault of bitsandbytes 0.50 on processors with AVX-512.

    There it mixes up the scales of rows that hold 32 elements more than whole blocks of 64.
    """
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(24, columns).to(dtype)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type=scheme)
        same = torch.equal(bnb.functional.dequantize_4bit(packed, state), decoded(packed, state))
        assert same or (columns % 64 == 32 and bnb.functional.has_avx512bf16())


def expected(case: Case, path: str) -> Tensor:
    """The paper's formula over what the library gives back."""
    adapter = load_file(case.trained.adapter / "adapter_model.safetensors")
    weight = case.weights[path]
    key = f"base_model.model.{path}."
    if key + "lora_magnitude_vector" not in adapter:
        return weight
    down, up = adapter[key + "lora_A.weight"].double(), adapter[key + "lora_B.weight"].double()
    direction = weight + 2.0 * up @ down
    magnitude = adapter[key + "lora_magnitude_vector"].double().unsqueeze(1)
    return magnitude * direction / direction.square().sum(dim=1, keepdim=True).sqrt()


@pytest.fixture(scope="module", params=CONFIGS)
def qlora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("qlora")
    return request.param, made(folder, llama(), request.param, MODULES, torch.bfloat16)


def merged(case: Case, scheme: str, out: Path, **how: Any) -> dict[str, Tensor]:
    options = api.ReadOptions(trained_on=scheme)
    choice = api.MergeOptions(dtype=DType.F32, **how)
    report = api.merge(
        case.trained.adapter, out, base=case.trained.base, options=options, how=choice
    )
    assert any(f"taken as {scheme} gives them back" in note for note in report.notes)
    api.verify(
        out, adapter=case.trained.adapter, base=case.trained.base, options=options, samples=None
    )
    return load_file(out / "model.safetensors")


def test_merges_exactly_as_trained(qlora: tuple[str, Case], tmp_path: Path) -> None:
    scheme, case = qlora
    got = merged(case, scheme, tmp_path / "out")
    original = load_file(case.trained.base / "model.safetensors")
    assert got.keys() == original.keys()
    assert len(case.weights) == 14
    for name, tensor in got.items():
        path = name.removesuffix(".weight")
        if path not in case.weights:  # embeddings, head, norms
            assert torch.equal(tensor, original[name].float()), name
            continue
        exact = expected(case, path)
        assert (tensor.double() - exact).abs().max() < 3e-7 * exact.abs().max(), name
        if path.rpartition(".")[2] not in MODULES:
            assert torch.equal(tensor, exact.float()), name
        # It matters: the original is as far off as the grid is coarse.
        assert (original[name].double() - case.weights[path]).norm() > 1e-3 * exact.norm()


def test_the_same_bytes_whatever_the_workers(qlora: tuple[str, Case], tmp_path: Path) -> None:
    scheme, case = qlora
    for workers in (1, 3):
        merged(case, scheme, tmp_path / str(workers), workers=workers)
    one, three = (tmp_path / n / "model.safetensors" for n in "13")
    assert one.read_bytes() == three.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_layers_that_are_stored_the_other_way(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """GPT-2's Conv1D: transformers turns it before it is quantised."""
    case = made(tmp_path, gpt2(), scheme, ["c_attn", "c_fc"], dtype)
    got = merged(case, scheme, tmp_path / "out")
    assert len(case.weights) == 8
    for path in case.weights:
        exact = expected(case, path).T
        tensor = got[f"{path}.weight"].double()
        assert (tensor - exact).abs().max() < 3e-7 * exact.abs().max(), path


def test_a_fresh_adapter_changes_nothing_on_its_own_base(
    tmp_path: Path, qlora: tuple[str, Case]
) -> None:
    """Magnitudes begin as the norms of the decoded weights: `inspect` sees which base they fit."""
    scheme, case = qlora
    found = {
        name: api.inspect(
            case.trained.adapter,
            base=case.trained.base,
            options=api.ReadOptions(trained_on=name),
        )
        for name in (scheme, None)
    }
    on, off = (found[name].total for name in (scheme, None))
    assert on is not None
    assert off is not None
    assert on.magnitude_shift < off.magnitude_shift


def test_quantised_again_on_the_grid_of_training(tmp_path: Path) -> None:
    """Only what is merged moves: the rest gets the codes that it was trained on."""
    case = made(tmp_path, llama(), "nf4", MODULES, torch.bfloat16)
    options = api.ReadOptions(trained_on="nf4")
    how = api.MergeOptions(quantize="nf4")
    out = tmp_path / "out"
    report = api.merge(case.trained.adapter, out, base=case.trained.base, options=options, how=how)
    assert report.survival is not None
    assert report.survival.total.plain_noise < 0.05
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    for path, module in loaded.named_modules():
        if is_quantised(module) and path.rpartition(".")[2] not in MODULES:
            assert torch.equal(given_back(module.weight), case.weights[path]), path


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("gptq", "not written"),
        ("nvfp4a16", "for serving, not for training"),
        ("nf5", "no quantizer named 'nf5'"),
    ],
)
def test_schemes_that_no_adapter_is_trained_on(
    scheme: str, message: str, qlora: tuple[str, Case], tmp_path: Path
) -> None:
    options = api.ReadOptions(trained_on=scheme)
    trained = qlora[1].trained
    with pytest.raises(InputError, match=message):
        api.merge(trained.adapter, tmp_path / "out", base=trained.base, options=options)


def test_a_base_of_64_bits(qlora: tuple[str, Case], tmp_path: Path) -> None:
    """The library takes none."""
    trained = qlora[1].trained
    wide = tmp_path / "wide"
    shutil.copytree(trained.base, wide)
    tensors = load_file(wide / "model.safetensors")
    cast = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(cast, wide / "model.safetensors", metadata={"format": "pt"})
    options = api.ReadOptions(trained_on="nf4")
    with pytest.raises(InputError, match="made of 16- or 32-bit floats") as caught:
        api.merge(trained.adapter, tmp_path / "out", base=wide, options=options)
    assert "F64" in caught.value.where[0]


def test_a_base_that_is_quantised_itself(qlora: tuple[str, Case], tmp_path: Path) -> None:
    scheme, case = qlora
    trained = case.trained
    how = api.MergeOptions(quantize="int8")
    api.merge(trained.adapter, tmp_path / "int8", base=trained.base, how=how)
    options = api.ReadOptions(trained_on=scheme)
    with pytest.raises(InputError, match="quantised itself"):
        api.merge(trained.adapter, tmp_path / "out", base=tmp_path / "int8", options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["nf4", "nf4_dq"])
def test_the_quantised_checkpoint_is_the_same_base(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """What transformers saves in NF4, and the original taken as NF4: bit for bit one merge.

    Both are what PEFT took the norms of: the library's decoding in the type of the weight.
    """
    case = made(tmp_path, llama(), scheme, MODULES, dtype)
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            case.trained.base,
            quantization_config=BitsAndBytesConfig(**CONFIGS[scheme]),
            device_map="cpu",
            dtype=dtype,
        )
        loaded.save_pretrained(tmp_path / "quantised")
    from_original = merged(case, scheme, tmp_path / "one")
    api.merge(
        case.trained.adapter,
        tmp_path / "two",
        base=tmp_path / "quantised",
        how=api.MergeOptions(dtype=DType.F32),
    )
    from_quantised = load_file(tmp_path / "two" / "model.safetensors")
    checkpoint, reader = open_base(tmp_path / "quantised", api.ReadOptions()), open_reader()
    for path, weight in case.weights.items():
        name = f"{path}.weight"
        with reader.rows(checkpoint.tensors[name]) as blocks:
            rows = blocks.read(0, len(weight), torch.empty(0, dtype=torch.uint8))
        assert torch.equal(rows.double(), weight), name
        assert torch.equal(from_original[name], from_quantised[name]), name
