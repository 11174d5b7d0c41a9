"""`merge --quantize --residual-rank`: beside the result, a LoRA of what its grid took."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_convert.api.outcome import allowed_rank
from dora_convert.api.weighting import check_weighting, weighting
from dora_convert.core.adapter import Adapter, BiasRule
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.lora import LoraLayer
from dora_convert.core.pairs import LoraFile
from dora_convert.core.plan import Job, Piece, Plan, Quantise
from dora_convert.core.reports import Residual
from dora_convert.core.tensors import DType
from dora_convert.errors import InputError, MismatchError
from dora_convert.loras import loras
from dora_convert.planning.lora import Lora, lora_layers, stack_problems
from dora_convert.planning.planner import Proposal, plan_merge
from dora_convert.planning.stacks import STACKS, Stack
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.sidefiles import documents_size, write_documents

if TYPE_CHECKING:
    from dora_convert.execution.project import Weights
    from dora_convert.maths.lowrank import Factors

__all__ = ["Correction", "ResidualOptions", "open_correction"]

_FOLDER = "residual"  # in the output


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualOptions:
    """What LoRA to write beside a quantised result.

    `rank`: of all modules. `weight` and `stats` weight errors as in `LoraOptions`.
    """

    rank: int
    weight: str = "plain"
    stats: Path | None = None


@dataclass(frozen=True, slots=True)
class Correction:
    """All that the LoRA needs but the result itself: found and checked before the work begins."""

    modules: Mapping[str, Sequence[tuple[Job, Piece]]]
    file: LoraFile
    rank: int
    weights: Weights | None
    notes: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """What it adds to the output."""
        names = (self.file.name, *(document.name for document in self.file.documents))
        return tuple(f"{_FOLDER}/{name}" for name in names)

    @property
    def nbytes(self) -> int:
        """Bytes on the disk while it is made: the file, its factors, and some modules whole."""
        largest = max(sum(_nbytes(*part) for part in parts) for parts in self.modules.values())
        return 2 * self.file.size + 2 * largest + documents_size(self.file.documents)

    def write(self, folder: Path, *, workers: int) -> Residual:
        """Make it from the finished checkpoint in `folder`, and put it there."""
        from dora_convert.execution.decoding import decoded
        from dora_convert.execution.factors import Scratch, write_pairs
        from dora_convert.execution.residual import Missed, correct

        stored = decoded(open_checkpoint(folder)).tensors
        missed = {
            path: [Missed(job, piece, stored[job.output.name]) for job, piece in parts]
            for path, parts in self.modules.items()
        }
        place = folder / _FOLDER
        if place.exists():  # of a run that was cut off here
            shutil.rmtree(place)
        write_documents(self.file.documents, place)
        scratch = Scratch(place / "scratch", list(missed))
        ranks: dict[str, int] = {}

        def keep(path: str, factors: Factors) -> None:
            scratch.keep(path, factors)
            ranks[path] = len(factors.singular)  # fewer where the layer has no more

        found = correct(
            missed,
            self.rank,
            keep,
            folder=place / "scratch",
            workers=workers,
            weights=self.weights,
        )
        write_pairs(place, self.file, ranks, scratch)
        shutil.rmtree(place / "scratch")
        return found


def open_correction(
    adapter: Adapter,
    checkpoint: Checkpoint,
    plan: Plan,
    how: ResidualOptions,
    *,
    transposed: Sequence[str] = (),
) -> Correction:
    """Lay the LoRA out for the modules that `plan` quantises.

    It is a PEFT folder that every stack reads, and for MLX weights what mlx-lm loads. Raises
    InputError, and MismatchError for modules that it cannot hold.
    """
    check_weighting(how.weight, how.stats)
    modules = _quantised(plan)
    if not modules:
        raise InputError("no adapted module is quantised: there is nothing that a LoRA could add")
    stack = STACKS["mlx" if _scheme(plan) == "mlx" else "any"]
    _check_rank(how.rank, stack)
    # Biases and whatever was trained whole are in the checkpoint already.
    part = replace(
        adapter,
        modules={p: replace(adapter.modules[p], bias_rule=BiasRule.KEEP) for p in modules},
        replaced={},
        token_rows={},
        base_model=None,  # the folder around it, wherever that goes
    )
    dense = plan_merge(part, checkpoint, transposed=transposed)
    layers = _layers(part, checkpoint, dense, stack)
    full = max(min(layer.shape) for layer in layers if not layer.empty)
    stored = allowed_rank(min(how.rank, full), stack)
    ranks = {layer.path: stored for layer in layers}
    lora = Lora(part, checkpoint.config, dense.names, layers, ranks, DType.F32)
    file = loras.get(stack.forms[0]).lay_out(lora)
    weights, notes = weighting(how.weight, how.stats, layers, dense.names, checkpoint)
    return Correction(modules, file, stored, weights, tuple(notes))


def _quantised(plan: Plan) -> dict[str, list[tuple[Job, Piece]]]:
    """The stored parts of every adapted module that is quantised, in the order of its rows."""
    found: dict[str, list[tuple[Job, Piece]]] = {}
    for job in plan.jobs:
        if isinstance(job.op, Quantise):
            for piece in job.op.pieces:
                found.setdefault(piece.module.path, []).append((job, piece))
    for parts in found.values():
        parts.sort(key=lambda part: part[1].offset)
    return found


def _scheme(plan: Plan) -> str:
    return next(job.op.scheme for job in plan.jobs if isinstance(job.op, Quantise))


def _check_rank(rank: int, stack: Stack) -> None:
    if rank < 1:
        raise InputError("a rank is 1 or more")
    if stack.ranks is not None and rank > stack.ranks[-1]:
        raise InputError(
            f"a LoRA of rank {rank} is loaded by no server",
            hint=f"The largest rank that one loads is {stack.ranks[-1]}.",
        )


def _layers(
    part: Adapter, checkpoint: Checkpoint, dense: Proposal, stack: Stack
) -> list[LoraLayer]:
    problems = stack_problems(part, checkpoint, stack)
    if problems:
        raise MismatchError(
            f"not all modules can have a LoRA beside them in {stack.title}",
            problems=problems,
            hint="Keep these dense with --keep-dense, or leave --residual-rank out.",
        )
    return lora_layers(part, checkpoint, dense, stack)


def _nbytes(job: Job, piece: Piece) -> int:
    """Of the rows in float32."""
    return (piece.stop - piece.start) * job.output.shape[1] * 4
