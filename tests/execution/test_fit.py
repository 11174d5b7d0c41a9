"""What the hooks add, and that fitting helps, is repeatable, and never makes things worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.plan import Piece
from dora_convert.errors import InputError, MismatchError
from dora_convert.execution import fit as under_test
from dora_convert.execution.fit import Dora, doras, fit
from dora_convert.execution.project import residuals
from dora_convert.maths.weighting import Weight

from .conftest import Store, exact, module

OUT, IN = MagnitudeAxis.OUT, MagnitudeAxis.IN


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(rows: int, columns: int, axis: MagnitudeAxis) -> dict[str, Tensor]:
    length = rows if axis is OUT else columns
    return {
        "up": random(rows, 4, seed=1),
        "down": random(4, columns, seed=2),
        "m": random(length, seed=3).abs() + 0.5,
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", MagnitudeAxis)
@pytest.mark.parametrize("stored", ["whole", "in two", "transposed"])
def test_the_teacher_is_the_dora(
    store: Store, stored: str, axis: MagnitudeAxis, *, bias: bool
) -> None:
    weight, tensors = random(12, 7, seed=9), parts(12, 7, axis)
    made = module(store("adapter.safetensors", **tensors), axis)
    layer: nn.Module = nn.Linear(7, 12, bias=bias)
    shift = random(12, seed=4) if bias else torch.zeros(12)
    if stored == "transposed":
        base = store(w=weight.T.contiguous())["w"]
        pieces = [(base, Piece(0, 7, made.transposed()))]
        layer = Conv1D(12, 7)
        values = {"weight": weight.T, "bias": shift}
    else:
        cut = 12 if stored == "whole" else 5
        refs = store(a=weight[:cut].clone(), **({"b": weight[cut:].clone()} if cut < 12 else {}))
        pieces = [(refs["a"], Piece(0, cut, made))]
        if cut < 12:
            pieces.append((refs["b"], Piece(0, 12 - cut, made, offset=cut)))
        values = {"weight": weight} | ({"bias": shift} if bias else {})
    layer.load_state_dict(values)
    flipped = {"layer"} if stored == "transposed" else set()
    if stored == "in two" and axis is IN:
        with pytest.raises(InputError, match="several tensors"):
            doras({"layer": pieces}, flipped)
        return
    (dora,) = doras({"layer": pieces}, flipped).values()
    x = random(3, 5, 7, seed=8)
    merged = exact(weight, **tensors, dim=1 if axis is OUT else 0)
    given = layer(x)
    got = given + dora.update(layer, x, given)
    torch.testing.assert_close(got.double(), x.double() @ merged.T + shift, rtol=0, atol=2e-5)


def test_a_teacher_of_magnitudes_alone(store: Store) -> None:
    weight, tensors = random(12, 7, seed=9), parts(12, 7, OUT)
    made = replace(module(store("adapter.safetensors", **tensors)), delta=None)
    (dora,) = doras({"layer": [(store(w=weight)["w"], Piece(0, 12, made))]}, ()).values()
    layer = nn.Linear(7, 12)
    layer.load_state_dict({"weight": weight, "bias": random(12, seed=4)})
    x = random(5, 7, seed=8)
    merged = exact(weight, **tensors, scaling=0.0)
    got = layer(x) + dora.update(layer, x, layer(x))
    expected = x.double() @ merged.T + random(12, seed=4)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("kind", ["plain", "diagonal", "both"])
def test_residuals_of_any_pair(store: Store, kind: str, *, transposed: bool) -> None:
    weight, tensors = random(12, 7, seed=9), parts(12, 7, OUT)
    made = module(store("adapter.safetensors", **tensors))
    update = exact(weight, **tensors) - weight.double()
    left, right = random(12, 3, seed=5), random(3, 7, seed=6)
    stored = (left, right)
    if transposed:
        made, weight, stored = made.transposed(), weight.T.contiguous(), (right.T, left.T)
    weighting = None
    moment = torch.eye(7, dtype=torch.float64)
    if kind != "plain":
        factor = random(7, 2, seed=7).double() if kind == "both" else None
        diagonal = random(7, seed=8).double()
        weighting = Weight(factor, diagonal), transposed
        moment = torch.diag(diagonal**2)
        moment += 0 if factor is None else factor @ factor.T
    part = store(w=weight)["w"], Piece(0, len(weight), made)
    plain, weighted = residuals([part], *stored, weighting)
    rest = update - left.double() @ right.double()
    assert plain == pytest.approx(float(rest.norm() / update.norm()), rel=1e-6)
    if weighting is None:
        assert weighted is None
    else:
        squares = [float(((t @ moment) * t).sum()) for t in (rest, update)]
        assert weighted == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-6)


HIDDEN, LAYERS = 32, 2
PATHS = [
    f"encoder.layer.{i}.{name}"
    for i in range(LAYERS)
    for name in ("attention.self.query", "attention.self.value", "output.dense")
]
TEXTS = [" ".join(str((7 * i * i + 3 * j) % 50) for j in range(i % 9 + 2)) for i in range(60)]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[BertModel]:
    """A tiny one, for which fewer steps and a single thread are enough."""
    monkeypatch.setattr(under_test, "STEPS", 80)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    yield BertModel(config).eval()
    torch.set_num_threads(threads)


def encode(texts: Sequence[str]) -> Mapping[str, Tensor]:
    ids = [[int(word) for word in text.split()] for text in texts]
    length = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in ids]),
    }


def teachers(model: BertModel) -> tuple[dict[str, Dora], dict[str, Tensor]]:
    """DoRAs, and their updates."""
    made, dense = {}, {}
    for i, path in enumerate(PATHS):
        weight = model.get_submodule(path).weight.detach()
        rows, columns = weight.shape
        c = 1 + 0.2 * random(rows, seed=i)
        up, down = 0.1 * random(rows, 2, seed=i + 20), 0.1 * random(2, columns, seed=i + 40)
        made[path] = Dora(True, c, up, down)
        dense[path] = (c - 1).unsqueeze(1) * weight + c.unsqueeze(1) * (up @ down)
    return made, dense


def truncated(dense: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    for path, update in dense.items():
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        root = s[:rank].sqrt()
        pairs[path] = u[:, :rank] * root, root.unsqueeze(1) * v[:rank]
    return pairs


@torch.no_grad()
def hidden(model: BertModel, updates: Mapping[str, Tensor], texts: Sequence[str]) -> Tensor:
    """The last hidden states of each text alone, with updates added to the weights."""
    before = {path: model.get_submodule(path).weight.clone() for path in updates}
    for path, update in updates.items():
        model.get_submodule(path).weight += update
    found = [model(**encode([text])).last_hidden_state[0] for text in texts]
    for path, weight in before.items():
        model.get_submodule(path).weight.copy_(weight)
    return torch.cat(found).double()


def test_fitting_helps_on_other_texts(model: BertModel) -> None:
    made, dense = teachers(model)
    pairs = truncated(dense, 3)
    kept = {path: (left.clone(), right.clone()) for path, (left, right) in pairs.items()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    fitted, report = fit(model, encode, TEXTS[:50], made, pairs)
    fresh = TEXTS[50:]
    goal = hidden(model, dense, fresh)

    def error(found: Mapping[str, tuple[Tensor, Tensor]]) -> float:
        got = hidden(model, {path: left @ right for path, (left, right) in found.items()}, fresh)
        return float((got - goal).norm() / goal.norm())

    assert error(fitted) < 0.8 * error(pairs)
    assert report.after < 0.8 * report.before
    assert (report.texts, report.held_out) == (40, 10)
    assert 0 < report.best_step <= report.steps
    # Neither the model nor what was given has changed, and no hook is left.
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())
    assert not any(m._forward_hooks for m in model.modules())
    for path, (left, right) in pairs.items():
        assert torch.equal(left, kept[path][0])
        assert torch.equal(right, kept[path][1])
        assert not fitted[path][0].requires_grad
    again, _ = fit(model, encode, TEXTS[:50], made, pairs)
    other, _ = fit(model, encode, TEXTS[:50], made, pairs, seed=1)
    assert all(torch.equal(again[path][0], fitted[path][0]) for path in PATHS)
    assert not torch.equal(other[PATHS[0]][0], fitted[PATHS[0]][0])


def test_what_is_reported_is_measured_on_held_out_texts(model: BertModel) -> None:
    """The first call is for them."""
    asked: list[str] = []

    def listening(texts: Sequence[str]) -> Mapping[str, Tensor]:
        asked.extend(texts)
        return encode(texts)

    made, dense = teachers(model)
    pairs = truncated(dense, 3)
    fitted, report = fit(model, listening, TEXTS[:50], made, pairs)
    assert sorted(asked) == sorted(TEXTS[:50])
    held = asked[: report.held_out]
    goal = hidden(model, dense, held)
    for found, told in ((pairs, report.before), (fitted, report.after)):
        got = hidden(model, {path: left @ right for path, (left, right) in found.items()}, held)
        assert told == pytest.approx(float((got - goal).norm() / goal.norm()), rel=1e-3)


def test_the_start_is_kept_where_nothing_is_better(model: BertModel) -> None:
    """At full rank it is the DoRA itself."""
    made, dense = teachers(model)
    pairs = truncated(dense, HIDDEN)
    fitted, report = fit(model, encode, TEXTS[:20], made, pairs)
    assert report.best_step == 0
    assert report.after == report.before < 1e-5
    assert fitted is pairs


def test_refused(model: BertModel) -> None:
    made, dense = teachers(model)
    pairs = truncated(dense, 3)
    with pytest.raises(InputError, match="9 texts are too few"):
        fit(model, encode, TEXTS[:9], made, pairs)
    moved = {f"other{path}": pair for path, pair in pairs.items()}
    with pytest.raises(MismatchError, match="lacks layers"):
        fit(model, encode, TEXTS, {f"other{p}": d for p, d in made.items()}, moved)


def test_other_prefixes_and_layers_out_of_the_body(model: BertModel) -> None:
    """Paths may begin otherwise; what the last hidden states do not depend on stays as it was."""
    made, dense = teachers(model)
    pairs = truncated(dense, 3)
    alone = model.pooler.dense.weight.detach()
    pairs["pooler.dense"] = truncated({"": 0.1 * alone}, 3)[""]
    none = torch.zeros(HIDDEN, 0)
    made["pooler.dense"] = Dora(True, torch.full((HIDDEN,), 1.1), none, none.T)
    named = {f"bert.{path}": pair for path, pair in pairs.items()}
    fitted, report = fit(model, encode, TEXTS, {f"bert.{p}": d for p, d in made.items()}, named)
    assert report.after < report.before
    for old, new in zip(pairs["pooler.dense"], fitted["bert.pooler.dense"], strict=True):
        assert torch.equal(old, new)
