"""`to-lora --fit`: the factors of a finished SVD, fitted to what the model puts out on texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_convert.api.building import build_model, read_lines
from dora_convert.core.adapter import LayerKind
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.lora import FitReport, LoraLayer, LoraModule
from dora_convert.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dora_convert.execution.factors import Scratch
    from dora_convert.execution.project import Part, Weights

__all__ = ["Fitting", "open_fitting"]

_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Fitting:
    """All that fitting needs but the factors: found and checked before the work begins."""

    texts: list[str]
    model: Any
    tokenizer: Any
    flipped: frozenset[str]
    seed: int

    @property
    def steps(self) -> int:
        """How many there will be."""
        from dora_convert.execution.fit import STEPS

        return STEPS

    def run(
        self,
        parts: Mapping[str, Sequence[Part]],
        ranks: Mapping[str, int],
        scratch: Scratch,
        weights: Weights | None,
        modules: Sequence[LoraModule],
        stepped: Callable[[], None],
    ) -> tuple[tuple[LoraModule, ...], FitReport]:
        """Fit what is in `scratch`, in place; `modules` with what they miss then."""
        from dora_convert.execution.fit import doras, fit
        from dora_convert.execution.project import residuals

        pairs = {}
        for path in parts:
            left, right = scratch.take(path)
            pairs[path] = self._turned(path, left[:, : ranks[path]], right[: ranks[path]])
        teachers = doras(parts, self.flipped)
        fitted, report = fit(
            self.model,
            self._encode,
            self.texts,
            teachers,
            pairs,
            seed=self.seed,
            stepped=stepped,
        )
        found = []
        for module in modules:
            left, right = self._turned(module.path, *fitted[module.path])
            scratch.put(module.path, left, right)
            weighting = None if weights is None else weights(module.path)
            plain, weighted = residuals(parts[module.path], left, right, weighting)
            found.append(replace(module, residual=plain, weighted_residual=weighted))
        return tuple(found), report

    def _turned(self, path: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """From the stored weight's sense to the layer's, and back."""
        return (right.T, left.T) if path in self.flipped else (left, right)

    def _encode(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"
        )


def open_fitting(
    text: Path, layers: Sequence[LoraLayer], checkpoint: Checkpoint, seed: int
) -> Fitting:
    """Read the texts and build the model. Raises InputError."""
    touched = [layer for layer in layers if not layer.empty]
    others = [layer.path for layer in touched if layer.kind is not LayerKind.LINEAR]
    if others:
        raise InputError(
            "only linear layers can be fitted",
            problems=others,
            hint="Leave --fit out, or these modules with --exclude.",
        )
    from dora_convert.execution.fit import check_texts

    texts = read_lines(text)
    check_texts(texts)
    model, tokenizer = build_model(checkpoint, "fitting")
    if tokenizer.pad_token is None:
        # What it is makes no difference: padding is masked.
        tokenizer.pad_token = tokenizer.eos_token
    flipped = frozenset(layer.path for layer in touched if layer.flipped)
    return Fitting(texts, model, tokenizer, flipped, seed)
