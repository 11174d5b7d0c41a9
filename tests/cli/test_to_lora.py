"""`dora-convert to-lora` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_convert import api
from dora_convert.api import projecting
from dora_convert.core.adapter import Adapter
from dora_convert.core.lora import RankChoice
from dora_convert.errors import InputError, VerificationError
from tests.cli.sandbox import HIDDEN, KEYS, MODULES, RANK, Result, Sandbox, digest, make_base

Lora = Callable[..., Result]
PREFIX = "base_model.model."


@pytest.fixture
def lora(box: Sandbox, run: Callable[..., Result]) -> Lora:
    return lambda *options: run(
        "to-lora", box.adapter, "--base", box.base, "--output", box.out, *options
    )


def config(box: Sandbox) -> Any:
    return json.loads((box.out / "adapter_config.json").read_text())


def stored(box: Sandbox) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(box.out / "adapter_model.safetensors")
    return tensors


def update(box: Sandbox, path: str) -> Tensor:
    """`W' - W` in float64."""
    adapter = box.load_adapter()
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    a, b, m = (adapter[f"{PREFIX}{path}.{part}"].double() for part in parts)
    weight = box.load_base()[f"{path}.weight"].double()
    direction = weight + 8 / RANK * b @ a
    return m[:, None] * direction / direction.norm(dim=1, keepdim=True) - weight


def missed(box: Sandbox) -> float:
    """What the written LoRA misses of all updates together."""
    tensors = stored(box)
    lost = total = 0.0
    for path in MODULES:
        goal = update(box, path)
        got = (
            tensors[f"{PREFIX}{path}.lora_B.weight"].double()
            @ tensors[f"{PREFIX}{path}.lora_A.weight"].double()
        )
        lost += float((goal - got).square().sum())
        total += float(goal.square().sum())
    return (lost / total) ** 0.5


def optimum(box: Sandbox, rank: int) -> float:
    values = [torch.linalg.svdvals(update(box, path)).square() for path in MODULES]
    return float((sum(v[rank:].sum() for v in values) / sum(v.sum() for v in values)) ** 0.5)


def test_path_alone_on_stdout(box: Sandbox, lora: Lora) -> None:
    before = digest(box.base, box.adapter)
    result = lora("--rank", 8)
    assert result.code == 0
    assert result.out == f"{box.out}\n"
    best = optimum(box, 8)
    assert missed(box) == pytest.approx(best, rel=2e-3)
    lines = result.err.splitlines()
    assert lines[0] == "Note: 2 pairs of zeros added: some stacks need every layer to be there"
    assert lines[1].startswith("4 modules at rank 8, ")
    assert lines[2].startswith(f"misses {best:.2%} of the update; ")
    assert lines[3] == (
        f"rank 8 keeps {1 - best**2:.1%} of the update's energy and misses {best:.1%} of its size; "
        "merge the adapter instead if you can"
    )
    assert config(box)["r"] == config(box)["lora_alpha"] == 8
    assert sorted(p.name for p in box.out.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert digest(box.base, box.adapter) == before
    assert not list(box.root.glob("*.partial"))


def test_default_rank_is_all_that_a_small_model_has(box: Sandbox, lora: Lora) -> None:
    result = lora("--per-module")
    assert result.code == 0
    assert config(box)["r"] == HIDDEN
    assert missed(box) < 1e-6
    assert "can be loaded by every stack" in result.err
    assert f"{MODULES[0]}: rank {HIDDEN}, misses 0.00% (without the magnitude " in result.err
    assert f"{MODULES[1]}: rank {KEYS}, misses 0.00%" in result.err


def test_json(box: Sandbox, lora: Lora) -> None:
    result = lora("--rank", 3, "--for", "peft", "--json")
    assert (result.code, result.err) == (0, "")
    report = result.json
    assert report["schema"] == "dora-convert/to-lora/1"
    assert (report["stack"], report["rank"], report["output"]) == ("peft", 3, str(box.out))
    assert report["residual"] == pytest.approx(optimum(box, 3), rel=2e-3)
    assert [module["path"] for module in report["modules"]] == sorted(MODULES)
    assert report["nbytes"] == sum(t.nbytes for t in stored(box).values())
    for module in report["modules"]:
        values = torch.linalg.svdvals(update(box, module["path"]))
        assert module["residual"] == pytest.approx(float(values[3:].norm() / values.norm()), 2e-3)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--rank", 4, "--energy", 0.5), "exclude each other"),
        (("--max-residual", 0.4, "--budget", "1MB"), "exclude each other"),
        (("--rank", 4, "--max-residual", 0.4, "--budget", "1MB"), "exclude each other"),
        (("--for", "nobody"), "nobody"),
        (("--energy", 1), "--energy"),
        (("--max-residual", 0), "--max-residual"),
        (("--rank", 0), "--rank"),
        (("--seed", -1), "--seed"),
        (("--dtype", "int4"), "--dtype"),
        (("--to", "onnx"), "--to"),
    ],
)
def test_wrong_usage(box: Sandbox, lora: Lora, options: tuple[object, ...], word: str) -> None:
    result = lora(*options)
    assert (result.code, result.out) == (2, "")
    assert word in result.err
    assert not box.out.exists()


@pytest.mark.parametrize("stack", ["any", "vllm"])
def test_fail_above_leaves_nothing(box: Sandbox, lora: Lora, stack: str) -> None:
    options = ("--rank", 1, "--for", stack, "--fail-above", 0.01)
    box.refuses(7, "the LoRA would miss", "larger rank", run=lambda: lora(*options))
    assert lora("--rank", 32, "--for", stack, "--fail-above", 0.01).code == 0
    kept = digest(box.out)
    box.refuses(7, "would miss", run=lambda: lora(*options, "--overwrite"))
    assert digest(box.out) == kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank", 600), ("rank 600 cannot be loaded by every stack", "512")),
        (("--compact",), ("not read by every stack", "--compact")),
        (("--for", "sglang", "--compact"), ("not read by SGLang",)),
        (("--for", "exllamav3"), ("ExLlamaV3 loads no LoRA at all", "dora-convert merge")),
        (("--for", "mlx", "--to", "peft"), ("mlx-lm loads no LoRA in the file format peft", "mlx")),
        (("--for", "vllm", "--to", "gguf"), ("vLLM 0.32 and later loads no LoRA in the",)),
        (("--budget", "100B"), ("the budget is too small for any rank that every stack loads",)),
        (
            ("--budget", "100B", "--for", "vllm", "--compact"),
            ("too small", f"least is {4 * (2 * 2 * HIDDEN + 2 * (HIDDEN + KEYS))} bytes"),
        ),
    ],
)
def test_what_a_stack_cannot_load(
    box: Sandbox, lora: Lora, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    box.refuses(3, *words, run=lambda: lora(*options))


@pytest.mark.parametrize(
    ("stack", "form", "file"),
    [
        ("llama.cpp", (), "adapter.gguf"),
        ("any", ("--to", "gguf"), "adapter.gguf"),
        ("mlx", (), "adapters.safetensors"),
    ],
)
def test_other_file_formats(
    box: Sandbox, lora: Lora, stack: str, form: tuple[str, ...], file: str
) -> None:
    known = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    box.configure(
        box.base, **known, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    result = lora("--rank", 3, "--for", stack, *form)
    assert (result.code, result.out) == (0, f"{box.out}\n")
    assert (box.out / file).stat().st_size > 1000
    assert not (box.out / "adapter_model.safetensors").exists()


def test_a_file_format_that_cannot_hold_the_model(box: Sandbox, lora: Lora) -> None:
    """Said before any work, with nothing left behind."""
    box.configure(box.base, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    box.refuses(4, "GPT2LMHeadModel", run=lambda: lora("--for", "llama.cpp"))
    box.refuses(4, "'gpt2'", run=lambda: lora("--for", "mlx"))


def test_tensors_that_a_lora_cannot_carry(box: Sandbox, lora: Lora) -> None:
    tensors = box.load_adapter()
    tensors[f"{PREFIX}lm_head.weight"] = box.load_base()["lm_head.weight"] + 1
    box.save_adapter(tensors)
    box.configure(box.adapter, modules_to_save=["lm_head"])
    words = "lm_head.weight: trained whole", "--ignore", "dora-convert merge"
    box.refuses(4, *words, run=lora)
    assert lora("--ignore", "*lm_head*").code == 0


def test_a_base_that_does_not_fit(box: Sandbox, lora: Lora) -> None:
    base = box.load_base()
    base[f"{MODULES[0]}.weight"] = base[f"{MODULES[0]}.weight"][:-1].clone()
    box.save_base(base)
    box.refuses(4, MODULES[0], run=lora)


@pytest.mark.parametrize("same", [True, False])
def test_an_adapter_with_copies_of_the_base(box: Sandbox, lora: Lora, *, same: bool) -> None:
    """What is added to the base's own weights cannot be an update of others."""
    spec = box.root / "copies.toml"
    spec.write_text(
        'title = "Copies"\nprefix = "base_model.model."\nscale = 2.0\n[tensors]\n'
        'down = "{module}.lora_A.weight"\nup = "{module}.lora_B.weight"\n'
        'magnitude = { name = "{module}.lora_magnitude_vector", shape = ["out"] }\n'
        'weight = "{module}.base"\n'
    )
    tensors, base = box.load_adapter(), box.load_base()
    for path in MODULES:
        copy = base[f"{path}.weight"]
        moved = copy if same or path != MODULES[1] else copy.flip(0)
        tensors[f"{PREFIX}{path}.base"] = moved.contiguous()
    box.save_adapter(tensors)
    if same:
        assert lora("--spec", spec).code == 0
        return
    words = "carries its own base weights", f"{MODULES[1]}: a LoRA is added to the base's own"
    box.refuses(4, *words, run=lambda: lora("--spec", spec))
    assert MODULES[0] not in lora("--spec", spec).err


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("FLOAT16", torch.float16)])
def test_types_are_called_as_those_of_a_merge(
    box: Sandbox, lora: Lora, name: str, dtype: torch.dtype
) -> None:
    assert lora("--dtype", name).code == 0
    assert {tensor.dtype for tensor in stored(box).values()} == {dtype}


def test_plain_lora_in(box: Sandbox, lora: Lora) -> None:
    factors = {n: t for n, t in box.load_adapter().items() if "magnitude" not in n}
    box.save_adapter(factors)
    box.configure(box.adapter, use_dora=False)
    result = lora("--rank", RANK, "--for", "llama.cpp", "--to", "peft")
    assert result.code == 0
    assert config(box)["r"] == RANK
    tensors = stored(box)
    assert tensors.keys() == factors.keys()
    for path in MODULES:
        a, b = f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"
        goal = 8 / RANK * factors[b].double() @ factors[a].double()
        torch.testing.assert_close((tensors[b] @ tensors[a]).double(), goal, rtol=0, atol=1e-7)
    assert "misses 0.00% of the update; the trained factors without the magnitude would miss 0.00%"\
        in result.err  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--for", "llama.cpp", "--max-rank", 7)])
def test_a_plain_lora_is_left_alone(
    box: Sandbox, lora: Lora, run: Callable[..., Result], options: tuple[object, ...]
) -> None:
    box.save_adapter({n: t for n, t in box.load_adapter().items() if "magnitude" not in n})
    box.configure(box.adapter, use_dora=False)
    before = digest(box.root)
    result = lora(*options)
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith("nothing to do: ")
    assert "--rank" in result.err
    # The base is not looked at.
    report = run("to-lora", box.adapter, "-o", box.out, "--json").json
    assert report["output"] is None
    assert report["modules"] == []
    assert digest(box.root) == before


@pytest.mark.parametrize(
    ("option", "least", "most"),
    [
        (("--rank", 2), 2, 2),
        (("--energy", 0.6), 1, 3),
        (("--max-residual", 0.7), 1, 3),
        (("--budget", f"{4 * 3 * (4 * HIDDEN + 2 * (HIDDEN + KEYS))}B"), 3, 3),
    ],
)
def test_a_plain_lora_is_made_smaller(
    box: Sandbox, lora: Lora, option: tuple[object, ...], least: int, most: int
) -> None:
    factors = {n: t for n, t in box.load_adapter().items() if "magnitude" not in n}
    box.save_adapter(factors)
    box.configure(box.adapter, use_dora=False)
    assert lora(*option, "--for", "peft").code == 0
    rank = config(box)["r"]
    assert least <= rank <= most
    for path in MODULES:
        a, b = f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"
        u, s, v = torch.linalg.svd(8 / RANK * factors[b].double() @ factors[a].double())
        goal = u[:, :rank] * s[:rank] @ v[:rank]
        got = stored(box)[b].double() @ stored(box)[a].double()
        torch.testing.assert_close(got, goal, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "choice", [("--rank", 5), ("--energy", 0.5), ("--rank", 5, "--weight", "norm")]
)
def test_room_that_a_stack_asks_for_is_filled(
    box: Sandbox, lora: Lora, choice: tuple[object, ...]
) -> None:
    """Ranks that are no rank of the stack cost as much as the next one, so they are that."""
    result = lora(*choice)
    assert result.code == 0
    assert config(box)["r"] == 8
    assert missed(box) == pytest.approx(optimum(box, 8), rel=2e-3)
    assert ("rank 8, not 5: every stack stores no smaller one" in result.err) == (5 in choice)
    assert {m["rank"] for m in lora(*choice, "--overwrite", "--json").json["modules"]} == {8}


class Heard:
    """A listener that adds up."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def started(self, nbytes: int) -> None:
        assert not self.total
        self.total = nbytes

    def advanced(self, nbytes: int) -> None:
        self.done += nbytes

    def sealed(self, file: str) -> None:
        raise AssertionError(file)


def test_progress(box: Sandbox) -> None:
    heard = Heard()
    api.to_lora(box.adapter, box.out, base=box.base, listener=heard)
    base = box.load_base()
    assert heard.total == heard.done == sum(base[f"{path}.weight"].nbytes for path in MODULES)


@pytest.mark.parametrize("quiet", ["-q", "--quiet"])
def test_quiet(box: Sandbox, lora: Lora, quiet: str) -> None:
    result = lora("--rank", 8, quiet)
    assert (result.code, result.out) == (0, f"{box.out}\n")
    assert "misses" not in result.err


def test_ranks_by_energy(box: Sandbox, lora: Lora) -> None:
    assert lora("--energy", 0.9, "--for", "peft", "--compact").code == 0
    needed = {}
    for path in MODULES:
        share = torch.linalg.svdvals(update(box, path)).square()
        needed[path] = int((share.cumsum(0) / share.sum() < 0.9).sum()) + 1
    top = max(needed.values())
    patterns = {path: rank for path, rank in sorted(needed.items()) if rank != top}
    assert config(box)["r"] == top
    assert config(box)["rank_pattern"] == config(box)["alpha_pattern"] == patterns
    tensors = stored(box)
    for path, rank in needed.items():
        assert len(tensors[f"{PREFIX}{path}.lora_A.weight"]) == rank
    # Without patterns all are stored at one rank that the stack knows.
    assert lora("--energy", 0.9, "--overwrite").code == 0
    assert config(box)["rank_pattern"] == {}
    (stored_rank,) = {len(t) for n, t in stored(box).items() if "lora_A" in n}
    assert stored_rank == config(box)["r"] == next(r for r in (8, 16, 32) if r >= top)


def test_a_ceiling_that_is_too_low_is_said(box: Sandbox, lora: Lora) -> None:
    options = ("--max-rank", 2, "--for", "vllm")
    for choice in (("--energy", 0.999), ("--max-residual", 0.001)):
        result = lora(*choice, *options, "--overwrite")
        assert result.code == 0
        assert "Note: 4 modules would need a rank above 2 for that" in result.err
    assert "--max-lora-rank 8" in result.err
    assert "would need" not in lora("--energy", 0.9, "--overwrite").err


@pytest.mark.parametrize("compact", [True, False])
def test_a_budget_is_kept(box: Sandbox, lora: Lora, compact: bool) -> None:
    options = ("--compact",) if compact else ()
    tensors = box.load_adapter()
    tensors[f"{PREFIX}{MODULES[0]}.lora_magnitude_vector"] *= 1.3  # one module needs more
    box.save_adapter(tensors)
    budget = 2 * 5 * (2 * 2 * HIDDEN + 2 * (HIDDEN + KEYS)) + 1
    result = lora("--budget", f"{budget}B", "--for", "peft", "--dtype", "bfloat16", *options)
    assert result.code == 0
    nbytes = sum(t.nbytes for t in stored(box).values())
    assert budget - 2 * 2 * HIDDEN < nbytes <= budget
    assert missed(box) <= optimum(box, 5) * 1.01
    ranks = {len(t) for n, t in stored(box).items() if "lora_A" in n}
    assert (len(ranks) > 1) == compact


def test_ranks_that_a_stack_is_not_made_for(box: Sandbox, run: Callable[..., Result]) -> None:
    """A model wide enough for them."""
    base = make_base(hidden=160)
    box.save_base(base)
    tensors = {}
    for path in MODULES:
        weight = base[f"{path}.weight"]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.ones(1, weight.shape[1])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.ones(len(weight), 1) * 1e-3
        tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = weight.norm(dim=1)
    box.save_adapter(tensors)
    box.configure(box.adapter, r=1)
    box.configure(box.base, hidden_size=160)
    options = ("--base", box.base, "-o", box.out, "--rank", 100)
    result = run("to-lora", box.adapter, *options, "--for", "tensorrt-llm")
    assert result.code == 0
    assert "ranks above 64 are not served well by TensorRT-LLM" in result.err
    assert "serve it with max_lora_rank=128" in result.err


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        (RankChoice(), "exactly one"),
        (RankChoice(rank=4, budget=5), "exactly one"),
        (RankChoice(rank=0), "1 or more"),
        (RankChoice(energy=0.5, ceiling=0), "1 or more"),
        (RankChoice(energy=1.0), "between 0 and 1"),
        (RankChoice(max_residual=-0.1), "between 0 and 1"),
    ],
)
def test_choices_that_make_no_sense(box: Sandbox, choice: RankChoice, word: str) -> None:
    how = api.LoraOptions(choice=choice)
    with pytest.raises(InputError, match=word):
        api.to_lora(box.adapter, box.out, base=box.base, how=how)


def test_library(box: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stack named 'x'"):
        api.to_lora(box.adapter, box.out, base=box.base, how=api.LoraOptions(stack="x"))
    box.configure(box.adapter, base_model_name_or_path=str(box.base))
    report = api.to_lora(box.adapter, box.out, how=api.LoraOptions(exact=True, workers=1))
    assert report.base == str(box.base)
    assert report.residual < 1e-7
    how = api.LoraOptions(choice=RankChoice(rank=1), limit=0.1)
    with pytest.raises(VerificationError):
        api.to_lora(box.adapter, tmp_path / "other", how=how)


def test_an_adapter_without_modules(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projecting, "read_adapter", lambda *_: Adapter("peft", {}))
    with pytest.raises(InputError, match="no module"):
        api.to_lora(box.adapter, box.out, base=box.base)
