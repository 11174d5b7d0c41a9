"""`to-lora` end to end: PEFT loads what it writes, and computes what the update says."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
)

from dora_convert import api
from dora_convert.core.lora import LoraReport, RankChoice
from dora_convert.core.tensors import DType
from dora_convert.errors import MismatchError

from .models import FIXTURES, MAKER, distance, outputs, pixels, quiet, tokens, train

PEFT = FIXTURES / "peft"
PREFIX = "base_model.model."
CLASSIFIER = ("*classifier*",)
# name, stack, ignored tensors
CASES: list[tuple[str, str, tuple[str, ...]]] = [
    ("llama_qv", "any", ()),
    ("llama_all_sharded", "any", ()),
    ("llama_patterns_rslora", "vllm", ()),
    ("llama_bf16", "sglang", ()),
    ("gpt2_conv1d", "peft", ()),
    ("llama_embed_head", "peft", ()),
    ("llama_tied", "peft", ()),
    ("resnet_conv2d", "peft", CLASSIFIER),
]


def run(
    name: str, out: Path, stack: str, ignore: tuple[str, ...] = (), **how: Any
) -> tuple[LoraReport, dict[str, Tensor]]:
    folder = PEFT / name
    report = api.to_lora(
        folder / "adapter",
        out,
        base=folder / "base",
        options=api.ReadOptions(ignore=ignore),
        how=api.LoraOptions(stack=stack, **how),
    )
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    return report, load_file(out / "adapter_model.safetensors")


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def pairs(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Module paths and `B @ A` as PEFT's get_delta_weight has it, a kernel flattened."""
    for name, down in tensors.items():
        path = name.removeprefix(PREFIX)
        if ".lora_A." in path:
            up = tensors[name.replace("lora_A", "lora_B")].double()
            yield (
                path.removesuffix(".lora_A.weight"),
                up.flatten(1) @ down.double().flatten(1),
            )
        elif path.endswith(".lora_embedding_A"):
            up = tensors[name.replace("embedding_A", "embedding_B")].double()
            yield path.removesuffix(".lora_embedding_A"), (up @ down.double()).T


def find(tensors: dict[str, Tensor], path: str) -> Tensor:
    """A weight by module path, flattened; GPT-2's files leave out the model's prefix."""
    name = f"{path}.weight"
    short = name.removeprefix("transformer.")
    if path == "lm_head" and name not in tensors:  # tied
        name = "model.embed_tokens.weight"
    return tensors[name if name in tensors else short].double().flatten(1)


def model_of(name: str) -> Any:
    cls = AutoModelForImageClassification if name.startswith("resnet") else AutoModelForCausalLM
    with quiet():
        return cls.from_pretrained(PEFT / name / "base", dtype=torch.float32).eval()


def inputs_of(name: str) -> dict[str, Tensor]:
    return pixels() if name.startswith("resnet") else tokens()


def loaded(name: str, adapter: Path) -> PeftModel:
    """PEFT's model, which warns of every key that is missing or left over."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model_of(name), adapter).eval()
    texts = [str(w.message) for w in caught]
    assert not [text for text in texts if "key" in text], texts
    return model


@pytest.mark.parametrize(("name", "stack", "ignore"), CASES)
def test_full_rank_is_the_merge(
    name: str, stack: str, ignore: tuple[str, ...], tmp_path: Path
) -> None:
    report, tensors = run(name, tmp_path / "lora", stack, ignore, choice=RankChoice(rank=96))
    base, expected = read(PEFT / name / "base"), load_file(PEFT / name / "expected.safetensors")
    seen = set()
    for path, update in pairs(tensors):
        weight, goal = find(base, path), find(expected, path)
        change = update.T if name.startswith("gpt2") else update
        error = float((weight + change - goal).norm() / goal.norm())
        # PEFT merges into the 16-bit weight, and rounds there.
        assert error < (4e-3 if name == "llama_bf16" else 1e-5), path
        seen.add(path)
    assert {module.path for module in report.modules} <= seen
    assert report.residual < 1e-6
    assert "100.0%" in report.advice

    if name != "llama_bf16":
        adapter = PEFT / name / "adapter"
        inputs = inputs_of(name)
        with quiet():
            dora = PeftModel.from_pretrained(model_of(name), adapter).eval()
            if ignore:  # the head that was left out stays the base's own
                head = model_of(name).classifier
                dora.base_model.model.classifier = head
            goal = outputs(dora, inputs)
        assert distance(outputs(loaded(name, tmp_path / "lora"), inputs), goal) < 1e-4


@pytest.mark.parametrize("rank", [3, 10])
@pytest.mark.parametrize(
    ("name", "stack", "ignore"), [case for case in CASES if case[0] != "llama_tied"]
)
def test_small_ranks_are_the_best_there_are(
    name: str, stack: str, ignore: tuple[str, ...], rank: int, tmp_path: Path
) -> None:
    report, tensors = run(name, tmp_path / "lora", stack, ignore, choice=RankChoice(rank=rank))
    base, expected = read(PEFT / name / "base"), load_file(PEFT / name / "expected.safetensors")
    told = {module.path: module for module in report.modules}
    if stack != "peft":  # the others are asked for 8 or 16, and get as many
        rank = 8 if rank == 3 else 16
    lost = total = 0.0
    truncated = {}
    for path, update in pairs(tensors):
        exact = find(expected, path) - find(base, path)
        if name.startswith("gpt2"):
            exact = exact.T
        if path not in told:  # a pair of zeros
            assert not update.any()
            continue
        left, singular, right = torch.linalg.svd(exact, full_matrices=False)
        best = float(singular[rank:].norm() / singular.norm())
        missed = float((exact - update).norm() / exact.norm())
        tolerance = 0.03 if name == "llama_bf16" else 2e-3
        assert missed == pytest.approx(best, rel=tolerance, abs=1e-6), path
        assert told[path].residual == pytest.approx(best, rel=tolerance, abs=1e-6), path
        assert told[path].rank == min(rank, len(singular))
        assert told[path].update == pytest.approx(float(singular.norm()), rel=tolerance)
        for least, energy in zip(told[path].energies, (0.9, 0.95, 0.99), strict=True):
            if least is not None and name != "llama_bf16":
                share = singular.square().cumsum(0) / singular.square().sum()
                assert least == int((share < energy).sum()) + 1
        truncated[path] = left[:, :rank] * singular[:rank] @ right[:rank]
        lost, total = lost + (missed * told[path].update) ** 2, total + told[path].update ** 2
    assert truncated.keys() == told.keys()
    assert report.residual == pytest.approx(math.sqrt(lost / total), rel=2e-2, abs=1e-6)

    if name != "llama_bf16":
        model = model_of(name)
        inputs = inputs_of(name)
        with torch.no_grad():
            for path, update in truncated.items():
                weight = model.get_submodule(path).weight
                change = update.T if name.startswith("gpt2") and path != "lm_head" else update
                weight += change.view_as(weight)
        got = outputs(loaded(name, tmp_path / "lora"), inputs)
        assert distance(got, outputs(model, inputs)) < 1e-4


def test_nvidia(tmp_path: Path) -> None:
    """Magnitude-only modules among others, and a base of 16 bits, against the formula."""
    folder = FIXTURES / "nvidia"
    stored = torch.load(folder / "adapter" / "adapter_model.bin", weights_only=True)
    trained = {name.removeprefix(PREFIX): t.double() for name, t in stored.items()}
    options = api.ReadOptions(allow_pickle=True)
    how = api.LoraOptions(choice=RankChoice(rank=512), stack="peft")
    report = api.to_lora(
        folder / "adapter", tmp_path / "lora", base=folder / "base", options=options, how=how
    )
    base = read(folder / "base")
    assert len(report.modules) == 14
    for path, update in pairs(load_file(tmp_path / "lora" / "adapter_model.safetensors")):
        v = find(base, path)
        if f"{path}.lora_A.weight" in trained:
            v = v + 8 / 4 * trained[f"{path}.lora_B.weight"] @ trained[f"{path}.lora_A.weight"]
        goal = trained[f"{path}.weight_m_wdecomp.weight"] * v / v.norm(dim=1, keepdim=True)
        error = float((find(base, path) + update - goal).norm() / goal.norm())
        assert error < 1e-5, path


def test_every_stack_gets_what_peft_computes(tmp_path: Path) -> None:
    """Padding, zero pairs, patterns and types: all the same function."""
    inputs = tokens()
    goal = outputs(loaded("llama_qv", PEFT / "llama_qv" / "adapter"), inputs)
    for i, (stack, how) in enumerate(
        [
            ("any", {"choice": RankChoice(rank=48)}),
            ("vllm", {"choice": RankChoice(rank=48)}),
            ("vllm", {"choice": RankChoice(rank=48), "compact": True}),
            ("peft", {"choice": RankChoice(energy=0.9999999), "compact": True}),
            ("llama.cpp", {"choice": RankChoice(max_residual=1e-5), "form": "peft"}),
        ]
    ):
        run("llama_qv", tmp_path / str(i), stack, **how)
        assert distance(outputs(loaded("llama_qv", tmp_path / str(i)), inputs), goal) < 1e-3


@pytest.mark.parametrize(
    ("dtype", "kind"), [(DType.F16, torch.float16), (DType.BF16, torch.bfloat16)]
)
def test_narrow_factors(dtype: DType, kind: torch.dtype, tmp_path: Path) -> None:
    report, tensors = run("llama_qv", tmp_path / "lora", "any", dtype=dtype)
    assert {t.dtype for t in tensors.values()} == {kind}
    assert report.nbytes == sum(t.nbytes for t in tensors.values())
    base, expected = (
        read(PEFT / "llama_qv" / "base"),
        load_file(PEFT / "llama_qv" / "expected.safetensors"),
    )
    for path, update in pairs(tensors):
        goal = find(expected, path) - find(base, path)
        assert float((update - goal).norm()) <= torch.finfo(kind).eps * float(goal.norm())


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    """`dense` would mean the pooler too, which was not adapted."""
    torch.manual_seed(5)
    model = BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            vocab_size=96,
        )
    )  # fmt: skip
    trained = train(
        tmp_path, model, tokens(),
        target_modules=["dense"], exclude_modules=".*pooler.*",
    )  # fmt: skip
    out = tmp_path / "lora"
    how = api.LoraOptions(choice=RankChoice(rank=32))
    api.to_lora(trained.adapter, out, base=trained.base, how=how)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["intermediate.dense", "output.dense"]
    with quiet():
        base = AutoModel.from_pretrained(trained.base).eval()
        model = PeftModel.from_pretrained(base, out).eval()
    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    assert len(adapted) == 6
    assert distance(outputs(model, trained.inputs), trained.outputs) < 1e-4


def test_a_plain_lora(tmp_path: Path) -> None:
    """Nothing but the trained factors, whatever the base holds, NaN too."""
    trained = train(
        tmp_path, MAKER.llama(3), tokens(), use_dora=False, target_modules=["q_proj", "o_proj"]
    )
    out = tmp_path / "lora"
    report = api.to_lora(
        trained.adapter, out, base=trained.base, how=api.LoraOptions(choice=RankChoice(rank=4))
    )
    assert report.residual < 1e-6
    assert report.without_magnitude == 0
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(trained.base).eval()
        model = PeftModel.from_pretrained(base, out).eval()
    assert distance(outputs(model, trained.inputs), trained.outputs) < 1e-4

    weights = read(trained.base)
    weights["model.layers.0.self_attn.q_proj.weight"][3] = torch.nan
    save_file(weights, trained.base / "model.safetensors")
    again = tmp_path / "again"
    api.to_lora(
        trained.adapter, again, base=trained.base, how=api.LoraOptions(choice=RankChoice(rank=4))
    )
    one, two = (folder / "adapter_model.safetensors" for folder in (out, again))
    assert one.read_bytes() == two.read_bytes()


def test_an_adapter_that_brings_another_base_weight(tmp_path: Path) -> None:
    """PEFT saves the whole embedding beside its factors; what is trained on it fits no other."""
    model = MAKER.llama(4)
    base = tmp_path / "base"
    model.save_pretrained(base)
    with quiet():
        lora = LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"])
        adapted = get_peft_model(model, lora).eval()
        MAKER.stir(adapted, torch.Generator().manual_seed(17))
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    copy = f"{PREFIX}model.embed_tokens.base_layer.weight"
    how = api.LoraOptions(stack="peft", choice=RankChoice(rank=4))
    assert copy in tensors
    report = api.to_lora(tmp_path / "adapter", tmp_path / "lora", base=base, how=how)
    assert len(report.modules) == 3

    for change, what in ((tensors[copy] * 1.1, "added to the base's own"), (None, "resize")):
        if change is None:
            a = f"{PREFIX}model.embed_tokens.lora_embedding_A"
            more = {a: tensors[a].repeat(1, 2), copy: tensors[copy].repeat(2, 1)}
        else:
            more = {copy: change}
        save_file(tensors | more, file)
        with pytest.raises(MismatchError) as caught:
            api.to_lora(tmp_path / "adapter", tmp_path / "other", base=base, how=how)
        assert any(what in problem for problem in caught.value.problems)
        assert not (tmp_path / "other").exists()
