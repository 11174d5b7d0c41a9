"""Factors fitted to what the whole model puts out: distillation of the DoRA into the LoRA.

Layer by layer the SVD is the best there is; together the layers can do better, since each can mend
what those before it miss. One copy of the model is both: to what its layers give is added either
the update of the DoRA, `diag(c) D + diag(c - 1) W`, or that of the LoRA, and its factors alone are
trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_convert.core.lora import FitReport
from dora_convert.errors import InputError, MismatchError
from dora_convert.execution.decoding import open_reader
from dora_convert.execution.lanes import Buffers
from dora_convert.execution.project import Part
from dora_convert.execution.update import open_update
from dora_convert.maths.deltas import LowRank

__all__ = ["STEPS", "Addition", "Dora", "Encode", "Pairs", "check_texts", "doras", "fit"]

# Texts to a batch of token ids and their attention mask.
Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
# `left [out, k]` and `right [k, in]` of each layer, in the layer's own sense.
Pairs = Mapping[str, tuple[Tensor, Tensor]]
# Chosen on a trained adapter at ranks 8 and 32: see docs/to-lora.md.
STEPS = 200
_BATCH = 16
_WARM = 0.1  # share of the steps
_RATE = 0.007  # of each factor's root mean square
_HELD_OUT, _MOST_HELD_OUT = 0.2, 128
_LOOKS = 8  # at the held-out texts
_LEAST = 10


@dataclass(frozen=True, slots=True)
class Dora:
    """What a DoRA does in a linear layer, in the layer's own sense.

    `factor` is c, `[out]` if `by_output`, else `[in]`; `up [out, r] @ down [r, in]` is D.
    """

    by_output: bool
    factor: Tensor
    up: Tensor
    down: Tensor

    def update(self, module: nn.Module, x: Tensor, given: Tensor) -> Tensor:
        """`T @ x`, where the module gives `given` for x."""
        bias = getattr(module, "bias", None)
        if self.by_output:
            product = given if bias is None else given - bias
            return (self.factor - 1) * product + self.factor * self._low_rank(x)
        excess: Tensor = module.forward(x * (self.factor - 1))
        return (excess if bias is None else excess - bias) + self._low_rank(x * self.factor)

    def _low_rank(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down), self.up)


def doras(modules: Mapping[str, Sequence[Part]], flipped: Container[str]) -> dict[str, Dora]:
    """Each layer's c and D, float32. `flipped`: those whose weight is stored `[in, out]`.

    Raises InputError for what cannot be fitted.
    """
    reader = open_reader()
    found = {}
    for path, parts in modules.items():
        with ExitStack() as stack:
            updates = [stack.enter_context(open_update(*part, reader, Buffers())) for part in parts]
        pairs = [update.delta for update in updates if isinstance(update.delta, LowRank)]
        if len(pairs) < len(updates):
            raise InputError(f"{path} is no product of two matrices: it cannot be fitted")
        by_row, down = updates[0].by_row, pairs[0].down.float()
        if len(parts) > 1 and not by_row:
            raise InputError(f"{path} is stored in several tensors: it cannot be fitted")
        factor = torch.cat([update.factor.float() for update in updates])
        up = torch.cat([pair.up.float() for pair in pairs])
        if path in flipped:
            up, down = down.T, up.T
        found[path] = Dora(by_row != (path in flipped), factor, up, down)
    return found


@dataclass(frozen=True, slots=True)
class _Batch:
    """Texts of about one length, and the DoRA's last hidden states of all their tokens."""

    tokens: Mapping[str, Tensor]
    goal: Tensor  # [tokens, hidden]
    square: float  # of its norm


# What a hook adds to `given`, which the module gives for x.
Addition = Callable[[nn.Module, Tensor, Tensor], Tensor]


@contextmanager
def _adding(modules: Mapping[str, nn.Module], additions: Mapping[str, Addition]) -> Iterator[None]:
    """While the modules give so much more."""

    def hook(add: Addition) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        return lambda module, inputs, given: given + add(module, inputs[0], given)

    handles = [modules[path].register_forward_hook(hook(add)) for path, add in additions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states of all tokens but padding, `[tokens, hidden]`."""
    # Of the body alone: a head's product is as wide as the vocabulary.
    states: Tensor = model.base_model(**tokens)[0]
    return states[tokens["attention_mask"].bool()]


def check_texts(texts: Sequence[str]) -> None:
    """Raise InputError for too few."""
    if len(texts) < _LEAST:
        raise InputError(
            f"{len(texts)} texts are too few to fit to",
            hint=f"At least {_LEAST}, one a line; better some hundreds.",
        )


def fit(
    model: Any,
    encode: Encode,
    texts: Sequence[str],
    teachers: Mapping[str, Dora],
    pairs: Pairs,
    *,
    seed: int = 0,
    stepped: Callable[[], None] = lambda: None,
) -> tuple[Pairs, FitReport]:
    """Pairs that make the model's last hidden states more like the DoRA's on `texts`.

    Adam on the relative squared error over all tokens but padding. A share of the texts is held
    out; what does best on those is returned, which is `pairs` where nothing does better. The same
    for a seed, on a machine and a number of torch's threads. Raises InputError for too few texts
    and MismatchError for layers that the model does not have.
    """
    check_texts(texts)
    generator = torch.Generator().manual_seed(seed)
    mixed = [texts[i] for i in torch.randperm(len(texts), generator=generator).tolist()]
    aside = min(_MOST_HELD_OUT, max(2, round(_HELD_OUT * len(texts))))
    model.requires_grad_(requires_grad=False)
    modules = _named(model, pairs)
    with _adding(modules, {path: dora.update for path, dora in teachers.items()}):
        held, training = (_batches(model, encode, t) for t in (mixed[:aside], mixed[aside:]))
    factors = {path: _parameters(pair) for path, pair in pairs.items()}
    with _adding(modules, {path: _low_rank(*pair) for path, pair in factors.items()}):
        before = best = _held_out(model, held)
        kept, best_step = pairs, 0
        optimiser = _optimiser(factors)
        order: list[int] = []
        for step in range(STEPS):
            order = order or torch.randperm(len(training), generator=generator).tolist()
            _step(model, optimiser, training[order.pop()], step)
            stepped()
            if (step + 1) % (STEPS // _LOOKS) == 0:
                error = _held_out(model, held)
                if error < best:
                    best, best_step, kept = error, step + 1, _copied(factors)
    return kept, FitReport(len(texts) - aside, aside, STEPS, best_step, before, best)


@torch.no_grad()
def _batches(model: Any, encode: Encode, texts: Sequence[str]) -> list[_Batch]:
    """The teacher's answers, computed once: each text comes up many times."""
    # Those of one length together: padding costs as much as text.
    texts = sorted(texts, key=len)
    batches = []
    for start in range(0, len(texts), _BATCH):
        tokens = encode(texts[start : start + _BATCH])
        goal = _hidden(model, tokens)
        batches.append(_Batch(tokens, goal, float(goal.square().sum())))
    return batches


def _parameters(pair: tuple[Tensor, Tensor]) -> tuple[nn.Parameter, nn.Parameter]:
    left, right = (nn.Parameter(factor.float().clone()) for factor in pair)
    return left, right


def _low_rank(left: Tensor, right: Tensor) -> Addition:
    return lambda _, x, __: linear(linear(x, right), left)


def _optimiser(factors: Pairs) -> torch.optim.Adam:
    # Adam's steps are of the size of its rate, whatever the gradient: so that of each factor is
    # measured by the factor.
    groups = [
        {"params": [factor], "size": _RATE * float(factor.detach().square().mean().sqrt())}
        for pair in factors.values()
        for factor in pair
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)


def _step(model: Any, optimiser: torch.optim.Adam, batch: _Batch, step: int) -> None:
    share = min(1.0, (step + 1) / (_WARM * STEPS)) * (1 + math.cos(math.pi * step / STEPS)) / 2
    for group in optimiser.param_groups:
        group["lr"] = share * group["size"]
    missed = (_hidden(model, batch.tokens) - batch.goal).square().sum()
    optimiser.zero_grad()
    (missed / batch.square).backward()  # type: ignore[no-untyped-call]
    optimiser.step()


@torch.no_grad()
def _held_out(model: Any, batches: Sequence[_Batch]) -> float:
    """||H - H'|| / ||H'|| over all of their tokens."""
    missed = sum(float((_hidden(model, b.tokens) - b.goal).square().sum()) for b in batches)
    whole = sum(batch.square for batch in batches)
    return math.sqrt(missed / whole) if whole else 0.0


def _copied(factors: Pairs) -> Pairs:
    return {
        path: (left.detach().clone(), right.detach().clone())
        for path, (left, right) in factors.items()
    }


def _named(model: nn.Module, paths: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The model's modules by the adapter's paths, which may differ in what they begin with."""
    modules = dict(model.named_modules())
    found, problems = {}, []
    for path in paths:
        near = [path] if path in modules else [
            name for name in modules if name.endswith(f".{path}") or path.endswith(f".{name}")
        ]  # fmt: skip
        near = [name for name in near if name]
        if len(near) == 1:
            found[path] = modules[near[0]]
        else:
            problems.append(path)
    if problems:
        raise MismatchError("the model that transformers builds lacks layers", problems=problems)
    return found
