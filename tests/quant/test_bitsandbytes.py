"""The schemes of bitsandbytes against the library, tensor by tensor as transformers saves them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor
from transformers import BitsAndBytesConfig

from dora_convert.errors import InputError
from dora_convert.quant import detect
from tests.quant.engine import find, normal, read_one, same_bytes, scheme, write

FOUR = {
    "nf4": ("nf4", False),
    "nf4_dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4_dq": ("fp4", True),
}
SHAPES = [(256, 384), (130, 200), (3, 5), (64, 1)]


def official(weight: Tensor, kind: str, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """What `Linear4bit` saves, taken before any forward, and the library's dense weight."""
    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compress_statistics=nested, quant_type=kind
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=nested, quant_type=kind
    )
    layer.to("cpu")
    dense = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return {f"a.{n}": t.clone() for n, t in layer.state_dict().items()}, dense


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_four_bits(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = normal(*shape, dtype=dtype)
    if shape[0] > 100:
        weight[1] = 0
    expected, dense = official(weight, *FOUR[name])
    step = 64 if shape[0] > 64 else None
    stored = write(scheme(name), weight, step=step)
    assert stored.keys() == expected.keys()
    for each, tensor in stored.items():
        if "quant_state" in each:
            text = bytes(tensor.tolist())
            assert json.loads(text) == json.loads(bytes(expected[each].tolist()))
            assert text.rstrip(b" ") == bytes(expected[each].tolist())
            assert name.endswith("_dq") or same_bytes(tensor, expected[each])
        else:
            assert same_bytes(tensor, expected[each]), each
    for source in (stored, expected):
        for rows in (None, 7, 50):
            ours = read_one(scheme(name), scheme(name).config([]), source, step=rows)
            # Not bytes: the library's CPU kernel gives FP4's second zero a sign.
            assert torch.equal(ours.to(dtype), dense), rows


@pytest.mark.parametrize("name", FOUR)
def test_the_library_loads_what_is_written(name: str) -> None:
    weight = normal(130, 200)
    stored = write(scheme(name), weight, step=64)
    quantized = {n.removeprefix("a.weight."): t for n, t in stored.items() if n != "a.weight"}
    state = functional.QuantState.from_dict(quantized, device=torch.device("cpu"))
    dense = functional.dequantize_4bit(stored["a.weight"].view(-1, 1), state)
    assert torch.equal(dense, official(weight, *FOUR[name])[1])


@pytest.mark.parametrize("name", FOUR)
def test_storage_in_another_type(name: str) -> None:
    """Sharded training stores the codes as bfloat16; the bytes are the same."""
    stored = write(scheme(name), normal(64, 64))
    other = stored | {"a.weight": stored["a.weight"].view(-1).view(torch.bfloat16).view(-1, 1)}
    config = scheme(name).config([])
    assert torch.equal(
        read_one(scheme(name), config, stored), read_one(scheme(name), config, other, step=3)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8(dtype: torch.dtype) -> None:
    weight = normal(130, 200, dtype=dtype)
    weight[1] = 0
    layer = bitsandbytes.nn.Linear8bitLt(200, 130, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(
        weight.clone(), requires_grad=False, has_fp16_weights=False
    )._quantize("cpu")
    expected = {f"a.{n}": t for n, t in layer.state_dict().items()}
    stored = write(scheme("int8"), weight, step=13)
    assert stored.keys() == expected.keys()
    for each, tensor in stored.items():
        assert same_bytes(tensor, expected[each]), each
    dense = read_one(scheme("int8"), scheme("int8").config([]), stored, step=7)
    assert same_bytes(
        dense, functional.int8_vectorwise_dequant(expected["a.weight"], expected["a.SCB"])
    )


@pytest.mark.parametrize("name", [*FOUR, "int8"])
@pytest.mark.parametrize("kept", [[], ["lm_head", "model.layers.0.mlp.gate"]])
def test_config_is_that_of_transformers(name: str, kept: list[str]) -> None:
    words = scheme(name).config(kept)["quantization_config"]
    options: dict[str, Any] = {"load_in_8bit": True}
    if name != "int8":
        kind, nested = FOUR[name]
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    theirs = BitsAndBytesConfig(**options, llm_int8_skip_modules=kept or None).to_dict()
    assert json.loads(json.dumps(theirs)) == json.loads(json.dumps(words))
    assert BitsAndBytesConfig.from_dict(words).to_dict() == theirs
    assert detect({"quantization_config": words}) == (name,)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": ["bfloat16"]},
        {"dtype": {}},
        {"blocksize": 2**33},  # a block is filled up with zeros
        {"blocksize": True},
        {"shape": [64, 64.0]},
        {"nested_offset": "0.0"},
        "[" * 50_000,
    ],
    ids=str,
)
def test_state_that_makes_no_sense(change: Any) -> None:
    stored = write(scheme("nf4"), normal(64, 64))
    name = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(stored[name].tolist()))
    text = change if isinstance(change, str) else json.dumps(state | change)
    stored[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(InputError) as caught:
        find(scheme("nf4"), {}, stored)
    assert caught.value.problems == (f"{name} holds no shape, type and block size",)


def test_double_quantisation_without_its_offset() -> None:
    stored = write(scheme("nf4_dq"), normal(64, 64))
    name = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(stored[name].tolist()))
    del state["nested_offset"]
    stored[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(InputError) as caught:
        find(scheme("nf4"), {}, stored)
    assert caught.value.problems == (f"{name} holds no nested_offset",)


def test_layers_left_plain_are_not_found() -> None:
    """unsloth's dynamic checkpoints: the tensors decide, not the config."""
    stored = write(scheme("nf4"), normal(64, 64))
    stored["b.weight"] = normal(64, 64)
    assert find(scheme("nf4"), {}, stored).keys() == {"a.weight"}


def test_faults_come_all_at_once() -> None:
    stored = write(scheme("nf4"), normal(64, 64))
    for name in ("b", "c", "d"):
        stored |= write(scheme("nf4"), normal(64, 64), name=f"{name}.weight")
    del stored["a.weight.absmax"]
    stored["b.weight"] = stored["b.weight"][:-1]
    stored["c.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(4, dtype=torch.uint8)
    del stored["d.weight.quant_state.bitsandbytes__nf4"]
    with pytest.raises(InputError) as caught:
        find(scheme("nf4"), {}, stored)
    assert caught.value.problems == (
        "a.weight.absmax is missing",
        "b.weight has 2047 bytes, [out, in] = [64, 64] needs 2048",
        "c.weight.quant_state.bitsandbytes__nf4 holds no shape, type and block size",
        "d.weight [2048, 1]: quant_state is missing",
    )
    stored = write(scheme("int8"), normal(64, 64)) | {"a.SCB": torch.ones(63)}
    with pytest.raises(InputError) as caught:
        find(scheme("int8"), {}, stored)
    assert caught.value.problems == ("a.weight I8 [64, 64]: SCB has 63 entries",)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    stored = {"a.weight": normal(64, 64)}
    with pytest.raises(InputError, match="not installed") as caught:
        write(scheme("nf4_dq"), stored["a.weight"])
    assert caught.value.hint == 'pip install "dora-convert[bnb]"'


def test_the_first_use_may_be_by_several_threads() -> None:
    """In a new process: one thread is half-way through the import when another begins."""
    code = """
import sys, threading, time, torch
from dora_convert.quant import writable
from dora_convert.core.tensors import DType, TensorSpec
scheme = writable("nf4_dq")
weight = scheme.layout(TensorSpec("a.weight", DType.F32, (64, 64)))
found = []
def work():
    found.append(len(scheme.constants(weight, torch.ones(64))["absmax"]))
first = threading.Thread(target=work)
first.start()
while first.is_alive() and not hasattr(
    sys.modules.get("bitsandbytes.functional"), "quantize_4bit"
):
    time.sleep(0.0005)
work()
first.join()
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[64, 64]", done.stderr
