"""What an adapter's files leave open, decided by what the base says: axis, row orders, biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dora_convert.core.adapter import (
    Adapter,
    BiasRule,
    DoraModule,
    LayerKind,
    MagnitudeAxis,
    RowOrder,
)
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.evidence import Moments, Stretch, Subject, fits_better
from dora_convert.errors import MismatchError
from dora_convert.planning.families import transposed_modules
from dora_convert.planning.names import Unsupported
from dora_convert.planning.resolve import Resolver, resolver

__all__ = ["open_questions", "squares", "subjects", "unsettled", "with_axis", "with_bias_rule"]


def open_questions(adapter: Adapter) -> list[str]:
    """What a reader without the base should know."""
    modules = adapter.modules.values()
    orders = {order for m in modules for order in (m.up_order, m.magnitude_order)}
    questions = []
    if adapter.is_axis_open:
        questions.append("whether a magnitude is one per output or one per input, the base decides")
    if orders - {RowOrder.SAME}:
        questions.append("the order of the rows of q and k depends on the base")
    if any(m.bias_rule is BiasRule.SCALED for m in modules):
        questions.append("where the base has a bias, its trainer scaled it with the row")
    return questions


def unsettled(adapter: Adapter) -> list[str]:
    """What a plan cannot be made of: an adapter that no base was asked about."""
    modules = adapter.modules.values()
    open_rows = [m.path for m in modules if {m.up_order, m.magnitude_order} != {RowOrder.SAME}]
    problems = [f"{path}: its rows are not in the order of the base's" for path in open_rows]
    if adapter.is_axis_open:
        problems.append("whether a magnitude is one per output or one per input is not decided")
    return problems


def subjects(
    adapter: Adapter, checkpoint: Checkpoint, *, transposed: Sequence[str] = ()
) -> list[Subject]:
    """The linear modules with a magnitude whose weight is found, dense and of the right shape.

    What is not found is told by `plan_merge`, with all else that does not fit.
    """
    names = resolver(checkpoint, adapter.modules)
    is_transposed = transposed_modules(checkpoint.config, transposed)
    found = []
    for path, module in adapter.modules.items():
        flip = is_transposed(path)
        weight = _weight(module, checkpoint, names)
        if module.magnitude is not None and module.kind is LayerKind.LINEAR and weight:
            subject = Subject(module, weight, is_transposed=flip)
            if _fits(subject):
                found.append(subject)
    return found


def _weight(
    module: DoraModule, checkpoint: Checkpoint, names: Resolver
) -> tuple[Stretch, ...] | None:
    if module.weight is not None:
        parts = [(module.weight, 0, module.weight.spec.shape[0] if module.weight.spec.shape else 0)]
    else:
        origin = names.find(f"{module.path}.weight")
        if origin is None or isinstance(origin, Unsupported):
            return None
        parts = [(checkpoint.tensors[rows.tensor], rows.start, rows.stop) for rows in origin]
    if any(not ref.spec.dtype.is_weight or len(ref.spec.shape) != 2 for ref, _, _ in parts):
        return None
    return tuple(Stretch(*part) for part in parts)


def _fits(subject: Subject) -> bool:
    module, widths = subject.module, {part.base.spec.shape[1] for part in subject.weight}
    rows = sum(part.stop - part.start for part in subject.weight)
    if len(widths) != 1 or module.magnitude is None:
        return False
    shape = (rows, widths.pop())
    if subject.is_transposed:
        shape = shape[::-1]
    length = shape[0] if module.axis is MagnitudeAxis.OUT else shape[1]
    fits = module.delta is None or module.delta.shape == shape
    return fits and module.magnitude.spec.numel == length and 0 not in shape


def squares(found: Sequence[Subject]) -> list[Subject]:
    """Those whose magnitude has the length of either axis."""
    return [s for s in found if s.module.delta is not None and len(set(s.module.delta.shape)) == 1]


def with_axis(adapter: Adapter, evidence: Mapping[MagnitudeAxis, Moments]) -> Adapter:
    """The axis that the magnitudes of all square modules together go with.

    Raises MismatchError where neither does beyond noise, or both do.
    """
    moments = {axis: evidence.get(axis, Moments()) for axis in MagnitudeAxis}
    for axis in MagnitudeAxis:
        if fits_better(moments[axis], moments[axis.flipped]):
            modules = {
                path: replace(module, axis=axis) if module.magnitude is not None else module
                for path, module in adapter.modules.items()
            }
            note = (
                f"the magnitudes are one per {axis.value}put, by their correlation with the base's "
                f"norms: {_told(moments)}"
            )
            return replace(
                adapter, modules=modules, is_axis_open=False, notes=(*adapter.notes, note)
            )
    where = _told(moments) if moments[MagnitudeAxis.OUT].count else "no weight was found to compare"
    raise MismatchError(
        "the magnitudes may belong to the outputs or to the inputs: all weights are square, and "
        "the base's norms do not tell",
        where=f"correlation of log m with log norms: {where}",
        hint="Say which with --axis out or --axis in.",
    )


def _told(moments: Mapping[MagnitudeAxis, Moments]) -> str:
    return ", ".join(
        f"{m.correlation:.2f} per {axis.value}put (noise {m.noise:.2f})"
        for axis, m in moments.items()
    )


def with_bias_rule(adapter: Adapter, checkpoint: Checkpoint, rule: BiasRule) -> Adapter:
    """`rule` for every module whose base has no bias: none is kept as well as scaled."""
    others = {path: m for path, m in adapter.modules.items() if m.bias_rule is not rule}
    if not others:
        return adapter
    names = resolver(checkpoint, adapter.modules)
    changed = {
        path: replace(module, bias_rule=rule)
        for path, module in others.items()
        if not _has_bias(path, adapter, names)
    }
    return replace(adapter, modules={**adapter.modules, **changed})


def _has_bias(path: str, adapter: Adapter, names: Resolver) -> bool:
    # One that was trained whole replaces the base's, or comes anew.
    return f"{path}.bias" in adapter.replaced or names.find(f"{path}.bias") is not None
