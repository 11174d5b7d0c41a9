"""What every scheme that can be written promises, whichever it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError, UnknownNameError
from dora_convert.quant import detect, quantizers, writable
from tests.quant.engine import WRITABLE, find, normal, read, read_one, same_bytes, scheme, write

# Largest relative error of a Gaussian weight, from the step of the grid: e4m3 2^-4 of the value at
# most, 8 bits about 1/127 of the peak of a row, 4 bits a tenth (QLoRA, table 2, and OCP MX).
ERROR = {"fp8": 0.04, "fp8_dynamic": 0.04, "w8a8": 0.02, "w8a16": 0.02, "int8": 0.02}


@pytest.fixture(params=WRITABLE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_all_are_found() -> None:
    assert set(WRITABLE) <= set(quantizers.names())
    assert len(WRITABLE) >= 5
    for each in quantizers.names():
        assert quantizers.get(each).title


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_equal_the_whole_and_it_reads_back(name: str, dtype: torch.dtype) -> None:
    quantizer = scheme(name)
    weight = normal(384, 256, dtype=dtype)
    whole = write(quantizer, weight)
    in_blocks = write(quantizer, weight, step=128)
    assert whole.keys() == in_blocks.keys()
    assert all(same_bytes(whole[n], in_blocks[n]) for n in whole), name

    config = quantizer.config([])
    assert detect(config) == (name,)
    dense = read_one(quantizer, config, whole)
    error = torch.linalg.norm(dense - weight.float()) / torch.linalg.norm(weight.float())
    assert 1e-4 < error < ERROR.get(name, 0.14)
    for step in (7, 128, 200):
        assert torch.equal(dense, read_one(quantizer, config, whole, step=step)), step


def test_a_found_weight_is_the_one_declared(name: str) -> None:
    quantizer = scheme(name)
    weight = normal(128, 256)
    declared = quantizer.layout(TensorSpec("m.q_proj.weight", DType.BF16, (128, 256)))
    stored = write(quantizer, weight, name="m.q_proj.weight")
    found = find(quantizer, quantizer.config([]), stored)
    assert found.keys() == {"m.q_proj.weight"}
    again = found["m.q_proj.weight"]
    assert again.dense.shape == declared.dense.shape
    assert again.settings == declared.settings
    assert {role: declared.parts[role] for role in again.parts} == again.parts


@settings(deadline=None, max_examples=60)
@given(
    which=st.sampled_from(WRITABLE),
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    start=st.integers(0, 299),
    seed=st.integers(0, 99),
)
def test_odd_shapes(which: str, rows: int, columns: int, start: int, seed: int) -> None:
    """Held exactly as the whole is, or refused with the shape in the message."""
    quantizer = scheme(which)
    weight = normal(rows, columns, dtype=torch.float32, seed=seed)
    try:
        declared = quantizer.layout(TensorSpec("a.weight", DType.F32, (rows, columns)))
    except InputError as error:
        refusal: InputError | None = error
    else:
        refusal = None
    if refusal is not None:
        assert f"{[rows, columns]}" in refusal.where[0]
        assert refusal.hint
        return
    whole = write(quantizer, weight)
    step = min(rows, quantizer.row_multiple(declared))
    in_blocks = write(quantizer, weight, step=step)
    assert all(same_bytes(whole[n], in_blocks[n]) for n in whole)
    (found,) = find(quantizer, quantizer.config([]), whole).values()
    dense = read(quantizer, found, whole)
    assert torch.isfinite(dense).all()
    assert torch.equal(dense, read(quantizer, found, whole, step=1 + start % rows))


def test_a_zero_weight_stays_zero(name: str) -> None:
    quantizer = scheme(name)
    stored = write(quantizer, torch.zeros(128, 128, dtype=torch.bfloat16))
    assert not read_one(quantizer, quantizer.config([]), stored).any()


def test_what_is_no_matrix_is_refused(name: str) -> None:
    for shape in ((128,), (2, 128, 128), (0, 128)):
        with pytest.raises(InputError, match="matrices only"):
            scheme(name).layout(TensorSpec("a.weight", DType.BF16, shape))


def test_a_missing_part_is_named(name: str) -> None:
    quantizer = scheme(name)
    stored = write(quantizer, normal(128, 128))
    main = max(stored, key=lambda n: stored[n].numel())
    for part in stored.keys() - {main}:
        rest = {n: t for n, t in stored.items() if n != part}
        if part == "a.weight_format":  # carries no information
            assert find(quantizer, quantizer.config([]), rest)
            continue
        with pytest.raises(InputError) as caught:
            find(quantizer, quantizer.config([]), rest)
        assert all("a." in line for line in caught.value.problems)


def test_what_stays_dense(name: str) -> None:
    quantizer = scheme(name)

    def takes(tensor: str, *shape: int) -> bool:
        return quantizer.takes(TensorSpec(tensor, DType.BF16, shape))

    assert takes("model.layers.0.self_attn.q_proj.weight", 64, 64)
    assert takes("model.layers.0.mlp.gate_proj.weight", 64, 64)
    assert not takes("model.layers.0.mlp.gate.weight", 8, 64)
    assert not takes("model.layers.0.input_layernorm.weight", 64)
    assert not takes("model.layers.0.self_attn.q_proj.bias", 64)
    assert takes("lm_head.weight", 320, 64) == takes("model.embed_tokens.weight", 320, 64)
    assert takes("lm_head.weight", 320, 64) == (name == "mlx")


def test_no_scheme_for_a_dense_base() -> None:
    assert detect({"model_type": "llama"}) == ()


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(InputError, match="bitnet"):
        detect({"quantization_config": {"quant_method": "bitnet"}})
    with pytest.raises(InputError, match="no quant_method"):
        detect({"quantization_config": {"bits": 4}})
    with pytest.raises(UnknownNameError):
        writable("w4a17")
