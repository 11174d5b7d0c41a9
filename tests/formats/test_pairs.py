"""Every stored adapter in every format that can hold it, and back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dora_convert.core.adapter import Adapter, DoraModule
from dora_convert.core.tensors import Permuted, TensorRef
from dora_convert.errors import InputError
from dora_convert.formats import formats

from .test_detect import ADAPTERS, adapter

# What can hold it without a base to ask, by what its name begins with, the longest first.
TAKEN = {
    "": {"mlx", "nvidia", "peft"},
    # Tensors that were trained whole have no place in mlx-lm's file; its embeddings are per token.
    "peft/bert_bias_all": {"nvidia", "peft"},
    "peft/llama_save_bias": {"nvidia", "peft"},
    "peft/llama_embed_head": {"peft"},
    "peft/llama_tied": {"peft"},
    "peft/llama_tokens": {"peft"},
    "mlx/embedding": {"mlx"},
    # Scalings and ranks of many kinds; kernels; magnitudes alone.
    "peft/llama_patterns_rslora": {"peft"},
    "peft/resnet_conv2d": {"peft"},
    "nvidia": {"nvidia"},
    # Rows that only the base puts in order, and biases that were scaled, if there are any.
    "megatron": set(),
    "torchtune/": set(),
    "torchtune/llama/adapter/adapter_model.pt": {"torchtune"},
    "torchtune/qwen2/adapter/adapter_model.pt": {"torchtune"},
    "small/fsdp_qlora": {"fsdp_qlora"},
    # One per input; rasbt's layout would lose the scaling.
    "small/catid": {"catid"},
    "small/rasbt": {"catid"},
    # A copy of the base beside every module.
    "small/vlt5": {"peft", "vlt5"},
    # Only a base says which modules their names mean.
    "diffusers/": set(),
    "lycoris/": set(),
    "OneTrainer": set(),
    "ai-toolkit": set(),
}


def content(ref: TensorRef | None) -> object:
    """Where the elements come from, and how often their axes are swapped on the way."""
    if ref is None:
        return None
    swaps = sum(isinstance(step, Permuted) for step in ref.view)
    return ref.source, ref.stored, ref.spec.shape, ref.spec.dtype, swaps % 2


def parts(module: DoraModule) -> list[object]:
    delta = module.delta
    tensors = delta.tensors if delta is not None else ()
    return [
        *(content(ref) for ref in (*tensors, module.magnitude, module.weight)),
        (module.kind, module.bias_rule, module.up_order, module.magnitude_order),
        (module.magnitude_is, module.axis) if module.magnitude is not None else None,
    ]


def check_same(one: Adapter, other: Adapter) -> None:
    assert one.modules.keys() == other.modules.keys()
    for path, module in one.modules.items():
        assert parts(module) == parts(other.modules[path]), path
        assert math.isclose(module.scaling, other.modules[path].scaling, rel_tol=4e-16), path
    assert {n: content(t) for n, t in one.replaced.items()} == {
        n: content(t) for n, t in other.replaced.items()
    }
    assert one.token_rows.keys() == other.token_rows.keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_there_and_back(name: str) -> None:
    found = replace(formats.get(ADAPTERS[name]).read(adapter(name)), is_scaling_open=False)
    taken = TAKEN[max((start for start in TAKEN if name.startswith(start)), key=len)]
    for target in taken:
        made = formats.get(target).write(found)
        check_same(found, formats.get(target).read(made))
        assert all(ref.spec.name == key for key, ref in made.tensors.items())
    for target in set(formats.names()) - taken:
        with pytest.raises(InputError) as caught:
            formats.get(target).write(found)
        assert caught.value.problems, target


def test_scaling_that_is_not_known_is_not_written() -> None:
    found = formats.get("rasbt").read(adapter("small/rasbt"))
    assert found.is_scaling_open
    with pytest.raises(InputError) as caught:
        formats.get("catid").write(found)
    assert any("--scale" in problem for problem in caught.value.problems)
