"""How the inputs of each module are weighted in `to-lora`: by norms, by statistics, or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.core.adapter import LayerKind
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.lora import LoraLayer
from dora_convert.errors import InputError, MismatchError
from dora_convert.planning.norms import adds_one, norm_tensors
from dora_convert.planning.resolve import Resolver
from dora_convert.storage.mark import checkpoint_mark

if TYPE_CHECKING:
    from dora_convert.execution.project import Weights
    from dora_convert.maths.weighting import Weight

__all__ = ["check_weighting", "weighting"]

_KNOWN = ("plain", "norm")


def check_weighting(weight: str | None, stats: Path | None) -> None:
    """Raise InputError for a name that is none, and for two ways at once."""
    if weight is not None and weight not in _KNOWN:
        known = ", ".join(_KNOWN)
        raise InputError(f"there is no weighting named {weight!r}", hint=f"Known: {known}.")
    if stats is not None and weight not in (None, "plain"):
        raise InputError("weight and stats exclude each other")


def weighting(
    weight: str | None,
    stats: Path | None,
    layers: Sequence[LoraLayer],
    names: Resolver,
    checkpoint: Checkpoint,
) -> tuple[Weights | None, list[str]]:
    """What `project` asks for each module's weight, None for plain, and notes on what it leaves.

    A `weight` of None is "norm" without a note on layers that have none: nobody asked for it.
    """
    if stats is not None:
        return _by_stats(stats, layers, checkpoint)
    if weight == "plain":
        return None, []
    weights, broken, missing = _by_norm(layers, names, checkpoint)
    return weights, broken if weight is None else [*broken, *missing]


def _by_norm(
    layers: Sequence[LoraLayer], names: Resolver, checkpoint: Checkpoint
) -> tuple[Weights, list[str], list[str]]:
    """Weights by the gain of the norm before a layer.

    And notes: on norms whose gains are not finite, and on layers without a norm.
    """
    from dora_convert.execution.decoding import open_reader
    from dora_convert.maths.weighting import Weight

    linear = _linear(layers)
    norms = {
        path: name
        for path, name in norm_tensors(linear, names).items()
        if checkpoint.tensors[name].spec.shape == linear[path].shape[1:]
    }
    reader, shift = open_reader(), 1 if adds_one(checkpoint.config) else 0
    gains, broken = {}, []
    for name in dict.fromkeys(norms.values()):
        gain = reader.load(checkpoint.tensors[name]).double() + shift
        if not gain.isfinite().all():
            paths = ", ".join(path for path in norms if norms[path] == name)
            broken.append(f"{name} has gains that are NaN or infinite: {paths} plain")
        elif (gain != gain[0]).any():  # one gain for all inputs weights nothing
            gains[name] = gain

    def weights(path: str) -> tuple[Weight, bool] | None:
        name = norms.get(path)
        return (Weight(None, gains[name]), linear[path].flipped) if name in gains else None

    without = sum(not layer.empty for layer in layers) - len(norms)
    missing = [f"{without} modules have no known norm before them: plain"] if without else []
    return weights, broken, missing


def _by_stats(
    file: Path, layers: Sequence[LoraLayer], checkpoint: Checkpoint
) -> tuple[Weights, list[str]]:
    """Weights from a stats file. Raises MismatchError if it is another base's or lacks modules."""
    from dora_convert.execution.stats import open_stats

    if not file.exists():
        raise InputError(f"there is no file {file.name}", where=str(file))
    stats, linear = open_stats(file, mark=checkpoint_mark(checkpoint)), _linear(layers)
    entries, problems = {}, []
    for path, layer in linear.items():
        entry = stats.find(path)
        if entry is None:
            problems.append(f"{path}: not in the file")
        elif stats.size(entry) != layer.shape[1]:
            problems.append(f"{path}: {layer.shape[1]} inputs, {stats.size(entry)} in the file")
        else:
            entries[path] = entry
    if problems:
        raise MismatchError(
            "the statistics do not cover this adapter", where=str(file), problems=problems
        )

    def weights(path: str) -> tuple[Weight, bool] | None:
        return (stats.weight(entries[path]), linear[path].flipped) if path in entries else None

    without = sum(not layer.empty for layer in layers) - len(linear)
    return weights, [f"{without} modules are no linear layers: plain"] if without else []


def _linear(layers: Sequence[LoraLayer]) -> dict[str, LoraLayer]:
    return {
        layer.path: layer for layer in layers if layer.kind is LayerKind.LINEAR and not layer.empty
    }
