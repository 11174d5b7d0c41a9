"""`to-lora --weight`, `--stats` and `--fit`, and `stats`: on a model that transformers builds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dora_convert.execution import fit
from dora_convert.execution.stats import Sketch, save_stats
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.mark import checkpoint_mark
from tests.cli.sandbox import HIDDEN, MODULES, VOCAB, Sandbox, digest

WORDS = [f"w{i}" for i in range(VOCAB - 2)]
TEXTS = [
    " ".join(WORDS[(5 * i * i + 3 * j) % len(WORDS)] for j in range(i % 7 + 3)) for i in range(30)
]


@pytest.fixture
def texts(box: Sandbox) -> Path:
    """A base with a tokenizer that knows words, and texts of these."""
    box.configure(box.base, max_position_embeddings=64, rms_norm_eps=1e-6)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *WORDS])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (box.base / "tokenizer.json").write_text(json.dumps(tokenizer))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (box.base / "tokenizer_config.json").write_text(json.dumps(about))
    file = box.root / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n\n")
    return file


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "STEPS", 40)


def to_lora(box: Sandbox, *options: object) -> object:
    return box.run("to-lora", box.adapter, "-b", box.base, "-o", box.out, "--rank", 8, *options)


def statistics(box: Sandbox, size: int = HIDDEN, modules: tuple[str, ...] = MODULES) -> None:
    sketch = Sketch(size)
    sketch.add(torch.randn(99, size, generator=torch.Generator().manual_seed(0)))
    mark = checkpoint_mark(open_checkpoint(box.base))
    save_stats(box.root / "stats", dict.fromkeys(modules, sketch), mark=mark)


@pytest.mark.parametrize("options", [("--weight", "norm"), (), ("--workers", 3)])
def test_norm_is_the_weighted_optimum(box: Sandbox, options: tuple[object, ...]) -> None:
    """It is the default, too."""
    base = box.load_base()
    gain = torch.linspace(0.1, 3, HIDDEN)
    box.save_base(base | {"model.layers.0.input_layernorm.weight": gain})
    assert to_lora(box, *options, "--json").code == 0
    made, adapter = load_file(box.out / "adapter_model.safetensors"), box.load_adapter()
    path = MODULES[0]
    key, w = f"base_model.model.{path}", base[f"{path}.weight"].double()
    v = w + 2 * adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
    m = adapter[f"{key}.lora_magnitude_vector"].double()
    update = (m / v.norm(dim=1)).unsqueeze(1) * v - w
    u, s, vt = torch.linalg.svd(update * gain.double(), full_matrices=False)
    best = (u[:, :8] * s[:8]) @ vt[:8] / gain.double()
    product = made[f"{key}.lora_B.weight"].double() @ made[f"{key}.lora_A.weight"].double()
    assert float((product - best).norm()) < 1e-5 * float(best.norm())


@pytest.mark.parametrize("gain", [torch.full((HIDDEN,), 2.0), torch.full((HIDDEN,), torch.nan)])
def test_a_gain_that_weights_nothing(box: Sandbox, gain: torch.Tensor) -> None:
    """The same for all inputs, or no numbers."""
    norms = {f"model.layers.{n}.input_layernorm.weight": gain.clone() for n in range(2)}
    box.save_base(box.load_base() | norms)
    assert to_lora(box, "--weight", "plain").code == 0
    plain = (box.out / "adapter_model.safetensors").read_bytes()
    assert to_lora(box, "--overwrite", "--json").json["weighted_residual"] is None
    assert (box.out / "adapter_model.safetensors").read_bytes() == plain


@pytest.mark.parametrize("options", [("--weight", "norm"), ()])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gain_that_is_no_number_is_named(
    box: Sandbox, options: tuple[object, ...], bad: float
) -> None:
    """Once, with all that it stands before; layers of other norms are weighted as ever."""
    gains = [torch.linspace(0.1, 3, HIDDEN) for _ in range(2)]
    gains[0][5] = bad
    norms = [f"model.layers.{n}.input_layernorm.weight" for n in range(2)]
    box.save_base(box.load_base() | dict(zip(norms, gains, strict=True)))
    result = to_lora(box, *options, "--json")
    assert result.code == 0
    (note,) = (line for line in result.json["notes"] if "NaN or infinite" in line)
    assert norms[0] in note
    for module in result.json["modules"]:
        is_before = module["path"].startswith("model.layers.0.")
        assert (module["path"] in note) == is_before
        assert (module["weighted_residual"] is None) == is_before
    assert norms[0] in to_lora(box, *options, "--overwrite").err
    assert "NaN" not in to_lora(box, "--weight", "plain", "--overwrite").err


def test_plain(box: Sandbox) -> None:
    """Unweighted where that is asked for, and not otherwise."""
    gain = torch.linspace(0.1, 3, HIDDEN)
    box.save_base(box.load_base() | {"model.layers.0.input_layernorm.weight": gain})
    assert to_lora(box, "--weight", "plain", "--json").json["weighted_residual"] is None
    assert to_lora(box, "--overwrite", "--json").json["weighted_residual"] > 0


def test_stats(box: Sandbox) -> None:
    statistics(box)
    result = to_lora(box, "--stats", box.root / "stats", "--json")
    assert result.code == 0
    assert 0 < result.json["weighted_residual"] < 1
    assert all(module["weighted_residual"] is not None for module in result.json["modules"])


def test_refused_stats(box: Sandbox) -> None:
    file = box.root / "stats"
    statistics(box, modules=MODULES[1:])
    box.refuses(4, "do not cover", MODULES[0], run=lambda: to_lora(box, "--stats", file))
    statistics(box, size=HIDDEN + 1)
    box.refuses(4, "do not cover", "33 in the file", run=lambda: to_lora(box, "--stats", file))
    statistics(box)
    box.save_base({name: t * 1.01 for name, t in box.load_base().items()})
    box.refuses(4, "another base", run=lambda: to_lora(box, "--stats", file))
    box.refuses(3, "does not hold", run=lambda: to_lora(box, "--stats", box.factors))
    box.refuses(3, "no file", run=lambda: to_lora(box, "--stats", box.root / "none"))
    assert to_lora(box, "--stats", file, "--weight", "norm").code == 2
    assert to_lora(box, "--stats", file, "--weight", "plain").code == 2


def test_nothing_to_collect_from(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = box.root / "text", box.root / "s"

    def run() -> object:
        return box.run("stats", box.base, "--text", text, "-o", out)

    text.write_text("\n \n")
    box.refuses(3, "holds no text", run=run)
    text.write_text("one\n")
    box.refuses(3, "transformers cannot load", run=run)  # there is no tokenizer
    monkeypatch.setitem(sys.modules, "transformers", None)
    box.refuses(3, "dora-convert[calibrate]", run=run)


def test_collect_and_use(box: Sandbox, texts: Path) -> None:
    out = box.root / "s.safetensors"
    result = box.run("stats", box.base, "--text", texts, "-o", out)
    assert (result.code, result.out) == (0, f"{out}\n")
    assert "Loading" not in result.err  # transformers' own bar
    tokens = sum(len(text.split()) for text in TEXTS)
    assert f"15 modules over {tokens} tokens of 30 texts" in result.err
    # Anew, the same bytes; a file that is there is not replaced unasked.
    before = digest(out)
    box.refuses(
        5, "--overwrite", run=lambda: box.run("stats", box.base, "--text", texts, "-o", out)
    )
    again = box.run("stats", box.base, "--text", texts, "-o", out, "--overwrite", "--json")
    assert digest(out) == before
    assert (again.json["texts"], again.json["tokens"]) == (30, tokens)
    cut = box.run(
        "stats", box.base, "--text", texts, "-o", box.root / "c", "--max-length", 2, "--json"
    )
    assert cut.json["tokens"] == 60
    found = []
    for workers in (1, 3):
        assert to_lora(box, "--stats", out, "--workers", workers, "--overwrite").code == 0
        found.append(digest(box.out))
    assert found[0] == found[1]


def test_the_optimum_for_what_layers_see(box: Sandbox, texts: Path) -> None:
    """In float64, from the hidden states that transformers itself reports."""
    out = box.root / "s"
    assert box.run("stats", box.base, "--text", texts, "-o", out).code == 0
    report = to_lora(box, "--stats", out, "--json").json
    base, adapter = box.load_base(), box.load_adapter()
    path = MODULES[2]  # of the second layer
    model = LlamaForCausalLM.from_pretrained(box.base, dtype=torch.float32).eval()
    rows = []
    for text in TEXTS:
        ids = torch.tensor([[WORDS.index(word) + 2 for word in text.split()]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0].double()
        # The norm before the layer, whose gain is 1.
        rows.append(states / (states.square().mean(dim=1, keepdim=True) + 1e-6).sqrt())
    inputs = torch.cat(rows)
    key, w = f"base_model.model.{path}", base[f"{path}.weight"].double()
    a, b = (adapter[f"{key}.lora_{x}.weight"].double() for x in "AB")
    v = w + 2 * b @ a
    m = adapter[f"{key}.lora_magnitude_vector"].double()
    update = (m / v.norm(dim=1)).unsqueeze(1) * v - w
    goal = inputs @ update.T
    left = torch.linalg.svd(goal.T, full_matrices=False)[0][:, :8]
    best = left @ left.T @ update
    made = load_file(box.out / "adapter_model.safetensors")
    product = made[f"{key}.lora_B.weight"].double() @ made[f"{key}.lora_A.weight"].double()
    assert float((inputs @ (product - best).T).norm()) < 1e-3 * float((inputs @ best.T).norm())
    (told,) = (m for m in report["modules"] if m["path"] == path)
    missed = float((goal - inputs @ product.T).norm() / goal.norm())
    assert told["weighted_residual"] == pytest.approx(missed, rel=1e-3)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("start", [(), ("--weight", "norm")])
def test_fit(box: Sandbox, texts: Path, start: tuple[str, ...]) -> None:
    plain = to_lora(box, *start, "--json").json
    assert plain["fit"] is None
    result = to_lora(box, *start, "--fit", texts, "--overwrite", "--json")
    assert (result.code, result.err) == (0, "")
    report = result.json
    told = report["fit"]
    assert (told["texts"], told["held_out"], told["steps"]) == (24, 6, 40)
    assert 0 < told["after"] < told["before"]
    # What is reported is what was written: farther off in weights than the nearest.
    assert report["residual"] > plain["residual"]
    tensors, base, adapter = (
        load_file(box.out / "adapter_model.safetensors"),
        box.load_base(),
        box.load_adapter(),
    )
    for module in report["modules"]:
        key, w = f"base_model.model.{module['path']}", base[f"{module['path']}.weight"].double()
        v = (
            w
            + 2
            * adapter[f"{key}.lora_B.weight"].double()
            @ adapter[f"{key}.lora_A.weight"].double()
        )
        m = adapter[f"{key}.lora_magnitude_vector"].double()
        update = (m / v.norm(dim=1)).unsqueeze(1) * v - w
        rest = (
            update
            - tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
        )
        assert module["residual"] == pytest.approx(float(rest.norm() / update.norm()), rel=1e-4)
    first = digest(box.out)
    again = to_lora(box, *start, "--fit", texts, "--overwrite", "--workers", 3)
    assert digest(box.out) == first
    assert "fitted on 24 texts: on 6 others hidden states are " in again.err


@pytest.mark.usefixtures("few_steps")
def test_nothing_left_to_fit(box: Sandbox, texts: Path) -> None:
    result = to_lora(box, "--rank", 32, "--fit", texts)
    assert result.code == 0
    assert "fitting made nothing better on 6 held-out texts" in result.err


@pytest.mark.usefixtures("few_steps")
def test_refused_fits(box: Sandbox, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, none = box.root / "few", box.root / "none"
    few.write_text("w1 w2\n" * 9)
    box.refuses(3, "9 texts are too few", run=lambda: to_lora(box, "--fit", few))
    box.refuses(3, str(none), run=lambda: to_lora(box, "--fit", none))
    refused = ("--fit", texts, "--fail-above", 0.001)
    box.refuses(7, "would miss", run=lambda: to_lora(box, *refused))
    (box.base / "tokenizer.json").rename(box.root / "tokenizer.json")
    box.refuses(3, "transformers cannot load", run=lambda: to_lora(box, "--fit", texts))
    monkeypatch.setitem(sys.modules, "transformers", None)
    box.refuses(3, "fitting needs", "calibrate", run=lambda: to_lora(box, "--fit", texts))
