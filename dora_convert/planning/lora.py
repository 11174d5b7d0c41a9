"""A plain LoRA in the shape that a serving stack loads: which pairs it has, zero ones too."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dora_convert.core.adapter import Adapter, BiasRule, DoraModule, LayerKind
from dora_convert.core.bundle import Checkpoint, Json
from dora_convert.core.lora import LoraLayer
from dora_convert.core.plan import Merge, Piece, Plan
from dora_convert.core.tensors import COMPONENT_MARK, DType, TensorRef
from dora_convert.planning.families import head_of, is_tied
from dora_convert.planning.names import Unsupported
from dora_convert.planning.planner import Proposal
from dora_convert.planning.resolve import Resolver
from dora_convert.planning.stacks import Stack

__all__ = [
    "Lora",
    "affordable_rank",
    "copy_problems",
    "factor_shapes",
    "lora_layers",
    "spelled",
    "stack_problems",
    "suffixes",
    "targets",
]

_FOR_PIPELINES = ("comfyui", "diffusers")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Layers that stacks fuse into one matrix: a pair for one needs pairs for all.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


@dataclass(frozen=True, slots=True)
class Lora:
    """All that decides how a LoRA is stored. `ranks` are the stored ones, by path."""

    adapter: Adapter
    config: Json  # the base's
    names: Resolver
    layers: Sequence[LoraLayer]
    ranks: Mapping[str, int]
    dtype: DType

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks.values())


def targets(plan: Plan) -> dict[str, list[tuple[TensorRef, Piece]]]:
    """The stored parts of every merged module, in the order of its rows."""
    found: dict[str, list[tuple[TensorRef, Piece]]] = {}
    for job in plan.jobs:
        if isinstance(job.op, Merge):
            for piece in job.op.pieces:
                found.setdefault(piece.module.path, []).append((job.op.base, piece))
    for parts in found.values():
        parts.sort(key=lambda part: part[1].offset)
    return found


def stack_problems(adapter: Adapter, checkpoint: Checkpoint, stack: Stack) -> list[str]:
    """What the stack cannot hold of this adapter: nothing of it may be dropped in silence."""
    models = [str(name) for name in checkpoint.config.get("architectures") or ["unknown"]]
    problems = []
    several = next((path for path in adapter.modules if COMPONENT_MARK in path), None)
    if several is not None and stack.forms[0] not in _FOR_PIPELINES:
        problems.append(f"{several}: one of several models; give the folder of one as the base")
    if stack.models and stack.models.isdisjoint(models):
        problems.append(f"{models[0]}: only {', '.join(sorted(stack.models))} are taken")
    tied = _tied(checkpoint) and not stack.tied
    for path, module in adapter.modules.items():
        if module.kind is LayerKind.CONVOLUTION and not stack.convolutions:
            problems.append(f"{path}: a convolution")
        elif module.kind is LayerKind.EMBEDDING:
            problems += _end_problems(path, "an embedding", stack.embeddings, tied)
        elif head_of(path):
            problems += _end_problems(path, "an output head", stack.heads, tied)
        elif stack.inside not in path:
            problems.append(f"{path}: not a part of {stack.inside}N")
        if module.bias_rule is BiasRule.SCALED:
            problems.append(f"{path}: its bias was scaled as well, which a LoRA cannot carry")
    saved = [*adapter.replaced, *(f"{path} (token rows)" for path in adapter.token_rows)]
    problems += [f"{name}: trained whole, which a LoRA cannot carry" for name in saved]
    return problems


def _end_problems(path: str, what: str, able: bool, tied: bool) -> list[str]:
    if not able:
        return [f"{path}: {what}"]
    return [f"{path}: {what}, one tensor with the model's other end"] if tied else []


def _tied(checkpoint: Checkpoint) -> bool:
    """Whether both ends are one tensor; where it is left open, both are stored."""
    stored = any(head_of(name.removesuffix(".weight")) for name in checkpoint.tensors)
    return is_tied(checkpoint.config, head_stored=stored) is True


def copy_problems(adapter: Adapter, weights: Mapping[str, TensorRef]) -> list[str]:
    """Modules trained on a resized weight: the base, which a LoRA is added to, has another."""
    return [
        f"{path}: trained on {list(module.weight.spec.shape)}, base "
        f"{list(weights[path].spec.shape)}: a LoRA cannot resize it"
        for path, module in adapter.modules.items()
        if module.weight is not None
        and path in weights
        and module.weight.spec.shape != weights[path].spec.shape
    ]


def affordable_rank(layers: Iterable[LoraLayer], stack: Stack, elements: int) -> int:
    """The largest rank that the stack takes and that all pairs can have; 0 if there is none."""
    rank = elements // sum(sum(layer.shape) for layer in layers)
    return rank if stack.ranks is None else max((r for r in stack.ranks if r <= rank), default=0)


def lora_layers(
    adapter: Adapter, checkpoint: Checkpoint, proposal: Proposal, stack: Stack
) -> list[LoraLayer]:
    """A layer for each module, and zero pairs where the stack needs them complete."""
    stored, names = targets(proposal.plan), proposal.names
    layers = {path: _layer(module, stored[path]) for path, module in adapter.modules.items()}
    if stack.complete:
        for path in _missing(layers, names):
            shape = _shape(path, checkpoint, names)
            if shape is not None:
                flipped = _like(path, layers).flipped
                shape = shape[::-1] if flipped else shape
                layers[path] = LoraLayer(path, LayerKind.LINEAR, shape, (), flipped, empty=True)
    return [layers[path] for path in sorted(layers)]


def _layer(module: DoraModule, parts: Sequence[tuple[TensorRef, Piece]]) -> LoraLayer:
    base, piece = parts[0]
    flipped = module.axis is not piece.module.axis
    shape = (sum(part.stop - part.start for _, part in parts), base.spec.shape[1])
    kernel: tuple[int, ...] = ()
    if module.kind is LayerKind.CONVOLUTION and module.delta is not None:
        kernel = base.stored.shape[2:]
    return LoraLayer(module.path, module.kind, shape[::-1] if flipped else shape, kernel, flipped)


def _missing(layers: Mapping[str, LoraLayer], names: Resolver) -> Iterator[str]:
    """Paths that are not there, though other layers or fused siblings are."""
    wanted: dict[str, None] = {}
    depths: dict[str, int] = {}
    for path, layer in layers.items():
        if layer.kind is LayerKind.LINEAR:
            for sibling in _siblings(path):
                wanted.update(dict.fromkeys(_numbered(sibling, names, depths)))
    yield from (path for path in wanted if path not in layers)


def _siblings(path: str) -> list[str]:
    parent, dot, leaf = path.rpartition(".")
    group = next((group for group in _FUSED if leaf in group), (leaf,))
    return [f"{parent}{dot}{name}" for name in group]


def _numbered(path: str, names: Resolver, depths: dict[str, int]) -> list[str]:
    """The same path in every layer that the model has; not all layers need have it."""
    found = _NUMBER.search(path)
    if found is None:
        return [path]
    start, end = path[: found.start()], path[found.end() :]
    if start not in depths:
        depths[start] = _depth(start, names)
    paths = (f"{start}{n}{end}" for n in range(depths[start]))
    return [p for p in paths if names.find(f"{p}.weight") is not None]


def _depth(start: str, names: Resolver) -> int:
    """One more than the largest number that follows `start` in a name."""
    disk = spelled(start, names)
    numbers = (
        name[len(prefix) :].partition(".")[0]
        for name in names.origins
        for prefix in (start, disk)
        if name.startswith(prefix)
    )
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def _shape(path: str, checkpoint: Checkpoint, names: Resolver) -> tuple[int, int] | None:
    origin = names.find(f"{path}.weight")
    if origin is None or isinstance(origin, Unsupported):
        return None
    shape = checkpoint.tensors[origin[0].tensor].spec.shape
    return (sum(part.stop - part.start for part in origin), shape[1]) if len(shape) == 2 else None


def _like(path: str, layers: Mapping[str, LoraLayer]) -> LoraLayer:
    """A layer that the adapter has of the same kind: siblings are stored alike."""
    leaves = {p.rpartition(".")[2] for p in _siblings(path)}
    return next(layer for p, layer in layers.items() if p.rpartition(".")[2] in leaves)


def factor_shapes(layer: LoraLayer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `lora_A` and `lora_B` (of an embedding, its transposed pair) in PEFT."""
    out, inner = layer.shape
    if layer.kind is LayerKind.EMBEDDING:
        return (rank, out), (inner, rank)
    if layer.kernel:
        narrow = inner // math.prod(layer.kernel)
        return (rank, narrow, *layer.kernel), (out, rank, *(1 for _ in layer.kernel))
    return (rank, inner), (out, rank)


def suffixes(paths: Sequence[str], known: Resolver) -> list[str]:
    """The shortest ends of the paths that are the end of no other module's path."""
    # The names of adapted modules, also those that they have on disk only.
    stored = {known.find(f"{path}.weight") for path in paths} - {None}
    mine = {*paths, *(spelled(path, known) for path in paths)}
    mine |= {
        name.removesuffix(".weight")
        for name, origin in known.origins.items()
        if name.endswith(".weight") and origin in stored
    }
    others: set[str] = set()
    for path in {name.rpartition(".")[0] for name in known.origins} - mine:
        # The modules that hold it have names too.
        while path and path not in others:
            others.add(path)
            path = path.rpartition(".")[0]  # noqa: PLW2901
    taken = {end for path in others - mine for end in _ends(path)}
    return sorted({next((end for end in _ends(path) if end not in taken), path) for path in paths})


def spelled(path: str, known: Resolver) -> str:
    """The path as the checkpoint's names have it, prefix added or stripped."""
    if known.stripped and path.startswith(known.stripped):
        return path.removeprefix(known.stripped)
    return known.added + path


def _ends(path: str) -> list[str]:
    """All ends of a path, the shortest first and the whole last."""
    pieces = path.split(".")
    return [".".join(pieces[-n:]) for n in range(1, len(pieces) + 1)]
