"""Every tensor of the adapter to its place in the checkpoint, all faults collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from dora_convert.core.adapter import Adapter, DoraModule, MagnitudeAxis, TokenRows
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.tensors import TensorRef
from dora_convert.planning.families import (
    HEAD_TASKS,
    head_of,
    input_embedding,
    is_tied,
    task_head,
    transposed_modules,
)
from dora_convert.planning.names import Rows, Unsupported
from dora_convert.planning.resolve import Resolver, resolver

__all__ = ["Matching", "Target", "match"]

_HINTED = 20  # problems, each of which a search through all names may go with


@dataclass(frozen=True, slots=True)
class Target:
    """One module and its weight: `rows` of stored tensors, one after the other.

    `module` is oriented as the weight is stored. `creates` names a tensor that is not in the
    checkpoint: a head that was tied, whose values are in `rows` all the same.
    """

    module: DoraModule
    rows: tuple[Rows, ...]
    creates: str | None = None


@dataclass(slots=True)
class Matching:
    """Where the adapter's parts go. `replaced` and `patches` are keyed by tensor name.

    `names` is how they were found.
    """

    names: Resolver
    targets: list[Target] = field(default_factory=list)
    replaced: dict[str, TensorRef] = field(default_factory=dict)
    patches: dict[str, TokenRows] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def match(adapter: Adapter, checkpoint: Checkpoint, *, transposed: Sequence[str] = ()) -> Matching:
    """Resolve names, orient modules and compare shapes; never raises for what does not fit.

    `transposed` are globs of module paths that the user says are stored `[in, out]`.
    """
    names = resolver(checkpoint, adapter.modules)
    matching = Matching(names, notes=list(adapter.notes))
    if names.added or names.stripped:
        verb = f"prefix {names.added!r} added" if names.added else f"{names.stripped!r} stripped"
        matching.notes.append(f"module paths matched to the checkpoint's names with {verb}")
    if names.rivals:
        choices = ", ".join(repr(p) for p in (names.added or names.stripped, *names.rivals))
        matching.problems.append(
            f"the module paths fit the base's names in several ways, with the prefixes {choices}"
        )
    is_transposed = transposed_modules(checkpoint.config, transposed)
    any_flipped = False
    for path, module in adapter.modules.items():
        flip = is_transposed(path)
        any_flipped |= flip
        target = _target(module, checkpoint, names, matching.problems, flip=flip)
        if target is not None:
            matching.targets.append(target)
    _check_orientation(adapter, matching, any_flipped=any_flipped)
    _match_replaced(adapter, checkpoint, names, matching)
    _match_rows(adapter, checkpoint, names, matching)
    _check_overlaps(matching)
    _check_created(matching)
    return matching


def _check_orientation(adapter: Adapter, matching: Matching, *, any_flipped: bool) -> None:
    """The trainer met a layer stored [in, out], and nothing here says that there is one."""
    square = [
        target.module.path
        for target in matching.targets
        if target.module.delta is not None and len(set(target.module.delta.shape)) == 1
    ]
    if adapter.meets_transposed and square and not any_flipped:
        matching.problems.append(
            f"{square[0]}: the adapter's fan_in_fan_out says that weights of the base are stored "
            "[in, out], and the base's config does not say which; a square one fits either way: "
            "say which with --transposed GLOB, or set fan_in_fan_out to false if there is none"
        )


def _target(
    module: DoraModule,
    checkpoint: Checkpoint,
    names: Resolver,
    problems: list[str],
    *,
    flip: bool,
) -> Target | None:
    path, creates = module.path, None
    origin = names.find(f"{path}.weight")
    if origin is None and head_of(path):
        tied = _tied_input(checkpoint)
        if tied is not None:
            origin = (Rows(tied, 0, _rows_of(checkpoint.tensors[tied])),)
            creates = f"{path}.weight"
    if origin is None:
        near = names.near(f"{path}.weight") if len(problems) < _HINTED else []
        hint = f"; nearest: {', '.join(near)}" if near else ""
        problems.append(f"{path}: the base has no tensor {path}.weight{hint}")
        return None
    if isinstance(origin, Unsupported):
        problems.append(f"{path}: {origin.reason}")
        return None
    if flip and module.delta is not None and module.factors is None:
        problems.append(
            f"{path}: stored [in, out], for which only updates of two matrices can be turned"
        )
        return None
    oriented = module.transposed() if flip else module
    before = len(problems)
    _check_shape(oriented, origin, checkpoint.tensors, problems, flip=flip)
    _check_storage(oriented, origin, checkpoint.tensors, problems)
    return Target(oriented, origin, creates) if len(problems) == before else None


def _tied_input(checkpoint: Checkpoint) -> str | None:
    """The input embedding, where it is the head as well and so no head is stored."""
    paths = {n: n.removesuffix(".weight") for n in checkpoint.tensors}
    tied = [n for n, path in paths.items() if input_embedding(path)]
    if len(tied) != 1 or any(map(head_of, paths.values())):
        return None
    return tied[0] if is_tied(checkpoint.config, head_stored=False) else None


def _check_shape(
    module: DoraModule,
    rows: tuple[Rows, ...],
    tensors: Mapping[str, TensorRef],
    problems: list[str],
    *,
    flip: bool,
) -> None:
    stored = _matrix_shape(rows, tensors)
    if stored is None:
        names = ", ".join(r.tensor for r in rows)
        problems.append(f"{module.path}: {names} have no common row length, or no rows")
        return
    if module.weight is not None:
        copy, whole = module.weight.spec.shape, _base_shape(rows, tensors)
        embedding = input_embedding(module.path) or head_of(module.path)
        if len(copy) != len(whole) or list(copy[embedding:]) != whole[embedding:] or 0 in copy:
            problems.append(
                f"{module.path}: the adapter's own base weight {list(copy)}, base {whole}"
            )
            return
        stored = (copy[0], module.weight.spec.numel // copy[0])
    if module.delta is None:
        length = stored[0 if module.axis is MagnitudeAxis.OUT else 1]
        size = module.magnitude.spec.numel if module.magnitude is not None else length
        if size != length:
            problems.append(f"{module.path}: magnitude [{size}], base {list(stored)}")
        return
    kernel, conv = _kernel(module, rows, tensors)
    if module.delta.shape == stored and kernel == conv:
        return
    shown = module.delta.shape[::-1] if flip else module.delta.shape
    text = f"{module.path}: adapter {[*shown, *kernel]}, base {_base_shape(rows, tensors)}"
    if flip:
        text += " stored [in, out]"
    elif module.delta.shape[::-1] == stored:
        text += "; if this weight is stored [in, out], say so with --transposed GLOB"
    problems.append(text)


def _kernel(
    module: DoraModule, rows: tuple[Rows, ...], tensors: Mapping[str, TensorRef]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The convolution kernels of adapter and base; the flattened sizes alone can agree by chance.

    Where the adapter does not say, it is taken to be the base's. One of a single element is as good
    as none: image models have such layers as convolutions and as linear ones.
    """
    assert module.delta is not None
    base = tensors[rows[0].tensor].spec.shape[2:]
    own = base if module.delta.kernel is None else module.delta.kernel
    return ((), ()) if {*own, *base} <= {1} else (own, base)


def _base_shape(rows: tuple[Rows, ...], tensors: Mapping[str, TensorRef]) -> list[int]:
    first = tensors[rows[0].tensor].spec.shape
    return [sum(r.stop - r.start for r in rows), *first[1:]]


def _matrix_shape(
    rows: tuple[Rows, ...], tensors: Mapping[str, TensorRef]
) -> tuple[int, int] | None:
    widths = set()
    for part in rows:
        shape = tensors[part.tensor].spec.shape
        if len(shape) < 2 or 0 in shape:
            return None
        widths.add(tensors[part.tensor].spec.numel // shape[0])
    return (sum(r.stop - r.start for r in rows), widths.pop()) if len(widths) == 1 else None


def _check_storage(
    module: DoraModule,
    rows: tuple[Rows, ...],
    tensors: Mapping[str, TensorRef],
    problems: list[str],
) -> None:
    for part in rows:
        ref = tensors[part.tensor]
        if not ref.spec.dtype.is_weight:
            problems.append(
                f"{module.path}: {part.tensor} is stored as {ref.spec.dtype.label}: "
                "a quantised base cannot be merged into, take the 16-bit original"
            )
    whole = _is_whole(rows, tensors)
    if module.axis is MagnitudeAxis.IN and not whole:
        problems.append(
            f"{module.path}: a magnitude per input needs the whole weight, but the checkpoint "
            f"stores it cut or fused ({', '.join(r.tensor for r in rows)})"
        )
    if module.weight is not None and not whole:
        problems.append(f"{module.path}: the adapter's own base weight goes with a fused tensor")


def _is_whole(rows: tuple[Rows, ...], tensors: Mapping[str, TensorRef]) -> bool:
    return len(rows) == 1 and rows[0].stop - rows[0].start == _rows_of(tensors[rows[0].tensor])


def _rows_of(ref: TensorRef) -> int:
    return ref.spec.shape[0] if ref.spec.shape else 1


def _match_replaced(
    adapter: Adapter, checkpoint: Checkpoint, names: Resolver, matching: Matching
) -> None:
    for name, ref in adapter.replaced.items():
        origin = names.find(name)
        path = name.rpartition(".")[0]
        if origin is None:
            if _is_new(name, adapter):
                matching.replaced[name] = ref.renamed(name)
            else:
                near = names.near(name) if len(matching.problems) < _HINTED else []
                hint = f"; nearest: {', '.join(near)}" if near else ""
                matching.problems.append(f"{name}: the base has no such tensor{hint}")
            continue
        if isinstance(origin, Unsupported) or not _is_whole(origin, checkpoint.tensors):
            matching.problems.append(f"{name}: the checkpoint stores it cut or fused")
            continue
        stored = checkpoint.tensors[origin[0].tensor]
        shape = ref.spec.shape
        # A resized vocabulary, or a head with the base's name and another number of labels.
        grows = input_embedding(path) or head_of(path)
        grows |= adapter.task in HEAD_TASKS and task_head(path)
        if stored.spec.name in matching.replaced:
            matching.problems.append(f"{name}: {stored.spec.name} is replaced twice")
        elif not stored.spec.dtype.is_weight:
            matching.problems.append(f"{name}: the base stores {stored.spec.dtype.label} there")
        elif shape == stored.spec.shape or (grows and shape[1:] == stored.spec.shape[1:]):
            matching.replaced[stored.spec.name] = ref.renamed(stored.spec.name)
        else:
            matching.problems.append(
                f"{name}: adapter {list(shape)}, base {list(stored.spec.shape)}"
            )


def _is_new(name: str, adapter: Adapter) -> bool:
    """Whether a replaced tensor may be one that the base lacks: a task's head, or a tied one.

    Without its weight beside it a bias is none of these, but one whose name was not found.
    """
    path, _, leaf = name.rpartition(".")
    if adapter.task not in HEAD_TASKS:
        return head_of(path)
    return leaf != "bias" or f"{path}.weight" in adapter.replaced


def _match_rows(
    adapter: Adapter, checkpoint: Checkpoint, names: Resolver, matching: Matching
) -> None:
    for path, patch in adapter.token_rows.items():
        origin = names.find(f"{path}.weight")
        if origin is None and head_of(path) and _tied_input(checkpoint) is not None:
            # PEFT stores the rows of a tied head too: they are those of the input embedding.
            continue
        if origin is None or isinstance(origin, Unsupported) or len(origin) != 1:
            matching.problems.append(f"{path}: the base has no embedding {path}.weight")
            continue
        stored = checkpoint.tensors[origin[0].tensor].spec
        own = patch.weight.spec if patch.weight is not None else stored
        if len(own.shape) != 2 or {own.shape[1:], patch.rows.spec.shape[1:]} != {stored.shape[1:]}:
            matching.problems.append(
                f"{path}: trained rows {list(patch.rows.spec.shape)}, base {list(stored.shape)}"
            )
        elif not (stored.dtype.is_weight and own.dtype.is_weight):
            matching.problems.append(f"{path}: stored as {stored.dtype.label}, a quantised weight")
        elif max(patch.indices) >= own.shape[0]:
            matching.problems.append(
                f"{path}: token {max(patch.indices)} was trained, the base has {own.shape[0]} "
                "tokens: its vocabulary was resized"
            )
        else:
            matching.patches[stored.name] = replace(patch, rows=patch.rows.renamed(stored.name))


def _check_overlaps(matching: Matching) -> None:
    """No stored row may be changed twice."""
    taken: dict[str, list[tuple[int, int, str]]] = {}
    for target in matching.targets:
        if target.creates is None:
            for part in target.rows:
                taken.setdefault(part.tensor, []).append(
                    (part.start, part.stop, target.module.path)
                )
    for name, spans in taken.items():
        spans.sort()
        for (_, stop, one), (start, _, two) in pairwise(spans):
            if start < stop:
                matching.problems.append(f"{one} and {two} are both stored in {name}")
        for other in (matching.replaced, matching.patches):
            if name in other:
                matching.problems.append(f"{name} is both adapted ({spans[0][2]}) and replaced")
    for name in matching.replaced.keys() & matching.patches.keys():
        matching.problems.append(f"{name} is both replaced and patched")


def _check_created(matching: Matching) -> None:
    """No tensor may be made twice."""
    created = [target.creates for target in matching.targets if target.creates is not None]
    for name in {n for n in created if n in matching.replaced or created.count(n) > 1}:
        matching.problems.append(f"{name} is both adapted and replaced")
