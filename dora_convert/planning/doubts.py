"""Magnitudes that are not what they are called, recognised by how they sit on the base's norms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from dora_convert.core.adapter import Adapter, MagnitudeKind
from dora_convert.core.bundle import Json
from dora_convert.core.evidence import Moments, Sample
from dora_convert.core.tensors import DType
from dora_convert.errors import MismatchError
from dora_convert.planning.families import text_configs

__all__ = ["without_doubts"]

# Modules that Megatron cuts along their inputs; each process then knows a part of a row's norm.
_ROW_PARALLEL = ("o_proj", "down_proj")
_SHARDS = (2, 4, 8, 16)
# The length of a row of a new torch Linear: entries uniform within 1 / sqrt(in).
_NEW_LINEAR = 1 / math.sqrt(3)
# How far an untrained magnitude is off the norm: it was taken in the base's type.
_EXACT = 1e-3
_COARSE = {DType.BF16: 2**-8}


def without_doubts(adapter: Adapter, config: Json, seen: Sequence[Sample]) -> Adapter:
    """The adapter, its magnitudes taken for what they are, with a note on anything odd.

    Raises MismatchError for magnitudes from which no weight can be had.
    """
    if not seen:
        return adapter
    _refuse_shards(seen)
    _refuse_initial(config, seen)
    if _are_factors(seen):
        modules = {
            path: replace(module, magnitude_is=MagnitudeKind.FACTOR)
            for path, module in adapter.modules.items()
        }
        adapter = replace(adapter, modules=modules)
    note = _note(seen)
    return replace(adapter, notes=(*adapter.notes, note)) if note else adapter


def _note(seen: Sequence[Sample]) -> str:
    if _are_factors(seen):
        return (
            "the magnitudes are about 1 where the base's norms are not: taken as m / ||V||, as "
            "TensorRT-LLM's normalize_weights.py rewrites them; if that was not run, this is not "
            "the base that was trained on"
        )
    if all(sample.change <= _tolerance(sample) for sample in seen):
        return "the magnitudes are the base's own norms: they were not trained"
    if _is_constant(seen):
        return (
            "the magnitudes are near 0.577 everywhere, whatever the base's norms: mlx-lm before "
            "August 2024 began with those of a new layer, and this is what it trained"
        )
    return ""


def _tolerance(sample: Sample) -> float:
    magnitude = sample.subject.module.magnitude
    kinds = [part.base.spec.dtype for part in sample.subject.weight]
    if magnitude is not None:
        kinds.append(magnitude.spec.dtype)
    return max(_EXACT, *(_COARSE.get(kind, 0.0) for kind in kinds))


def _are_factors(seen: Sequence[Sample]) -> bool:
    """About 1 and not about the norms, nor longer where those are."""
    one = math.sqrt(statistics.fmean(sample.from_one for sample in seen))
    norm = math.sqrt(statistics.fmean(sample.from_norm for sample in seen))
    return one < 0.25 and norm > max(0.05, 2 * one) and _is_unrelated(seen)


def _is_constant(seen: Sequence[Sample]) -> bool:
    """The same in every row, and not because the base's are."""
    return _is_off(seen) and all(
        abs(sample.level / _NEW_LINEAR - 1) < 0.05 and sample.spread < 0.1 for sample in seen
    )


def _refuse_initial(config: Json, seen: Sequence[Sample]) -> None:
    """Norms of a model that transformers has just initialised: normal entries of one deviation."""
    parts = (config, *(config[key] for key in text_configs(config)))
    deviations = {part.get("initializer_range") for part in parts}
    for deviation in deviations:
        if not isinstance(deviation, float) or deviation <= 0 or not _is_off(seen):
            continue
        expected = [(sample, deviation * math.sqrt(_width(sample))) for sample in seen]
        if all(
            abs(sample.level / length - 1) < 0.05 and sample.spread < 2 / math.sqrt(_width(sample))
            for sample, length in expected
        ):
            raise MismatchError(
                "the magnitudes are those of a model that was only just initialised, not of the "
                "training",
                where=f"all are near {deviation:g} * sqrt(in), and do not go with the base's norms",
                hint="NeMo 2's exporter to PEFT writes such files; take NeMo's own checkpoint.",
            )


def _refuse_shards(seen: Sequence[Sample]) -> None:
    """Norms over one process's columns: about 1 / sqrt(processes) of the whole row's."""
    ours = [s for s in seen if _is_row_parallel(s)]
    others = [s for s in seen if not _is_row_parallel(s)]
    if not ours or not others or abs(_middle(others) - 1) > 0.1:
        return
    ratio = _middle(ours)
    for shards in _SHARDS:
        share = 1 / math.sqrt(shards)
        if abs(ratio / share - 1) < 0.07 and all(abs(s.ratio / share - 1) < 0.12 for s in ours):
            raise MismatchError(
                f"the magnitudes of {' and '.join(_ROW_PARALLEL)} are norms over a part of each "
                f"row: training ran on {shards} tensor-parallel processes, each with its own",
                where=f"m / ||W|| is {ratio:.2f} there, {_middle(others):.2f} elsewhere "
                f"(1 / sqrt({shards}) is {share:.2f})",
                problems=sorted(s.subject.module.path for s in ours)[:8],
                hint="The norm of whole rows was never known, so no merge is the trained model; "
                "leave these modules out with --exclude, or train again without tensor "
                "parallelism.",
            )


def _is_off(seen: Sequence[Sample]) -> bool:
    norm = math.sqrt(statistics.fmean(sample.from_norm for sample in seen))
    return norm > 0.1 and _is_unrelated(seen)


def _is_unrelated(seen: Sequence[Sample]) -> bool:
    """Whether long rows have no longer magnitudes."""
    total = Moments()
    for sample in seen:
        total += sample.moments
    # Not the correlation: a factor close to 1 may go with the norms, if only by a little.
    return total.slope < 0.5


def _is_row_parallel(sample: Sample) -> bool:
    return sample.subject.module.path.rpartition(".")[2] in _ROW_PARALLEL


def _middle(seen: Sequence[Sample]) -> float:
    return statistics.median(sample.ratio for sample in seen)


def _width(sample: Sample) -> int:
    return sample.subject.weight[0].base.spec.shape[1]
