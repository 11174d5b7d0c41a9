"""Stored adapter tensors to canonical parts: the checks that every format shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from dora_convert.core.adapter import DoraModule, LayerKind, MagnitudeAxis
from dora_convert.core.deltas import LowRank
from dora_convert.core.tensors import TensorRef

__all__ = ["check_replaced", "common_axis", "convolution", "linear", "magnitude", "usable"]


def linear(path: str, down: TensorRef, up: TensorRef, problems: list[str]) -> LowRank | None:
    """`down [rank, in]` and `up [out, rank]`, or None with the reason in `problems`."""
    if not usable(path, (down, up), problems):
        return None
    if len(down.spec.shape) != 2 or len(up.spec.shape) != 2:
        problems.append(f"{path}: expected two matrices, found {_shapes(down, up)}")
        return None
    if down.spec.shape[0] != up.spec.shape[1]:
        problems.append(
            f"{path}: the ranks disagree, {_shapes(down, up)}: expected [rank, in] and [out, rank]"
        )
        return None
    return LowRank(down, up)


def convolution(path: str, down: TensorRef, up: TensorRef, problems: list[str]) -> LowRank | None:
    """The same from `down [rank, in, k...]` and `up [out, rank, 1...]`, kernels flattened."""
    if not usable(path, (down, up), problems):
        return None
    rank, out = down.spec.shape[0], up.spec.shape[0]
    if len(up.spec.shape) != len(down.spec.shape) or up.spec.numel != out * up.spec.shape[1]:
        problems.append(
            f"{path}: expected [rank, in, k...] and [out, rank, 1...], found {_shapes(down, up)}"
        )
        return None
    if up.spec.shape[1] != rank:
        grouped = rank % up.spec.shape[1] == 0
        problems.append(
            f"{path}: {_shapes(down, up)} is a grouped convolution, whose update does not fit "
            "into a grouped weight: it cannot be merged"
            if grouped
            else f"{path}: the ranks disagree, {_shapes(down, up)}"
        )
        return None
    return LowRank(down.reshaped(rank, down.spec.numel // rank), up.reshaped(out, rank))


def magnitude(
    path: str,
    stored: TensorRef,
    shape: tuple[int, int],
    problems: list[str],
    *,
    axis: MagnitudeAxis | None,
    undecided: list[str] | None = None,
) -> tuple[TensorRef, MagnitudeAxis] | None:
    """The magnitude as a vector and its axis on the update's `shape [out, in]`.

    `axis` decides where it is given; otherwise the shape does. Where that is not possible (a row
    vector on a square weight) the axis is OUT for the time being, and `path` goes into
    `undecided`. None with the reason in `problems`.
    """
    if not usable(path, (stored,), problems):
        return None
    out, inner = shape
    count = stored.spec.numel
    vector = stored.reshaped(count)
    lengths = {MagnitudeAxis.OUT: out, MagnitudeAxis.IN: inner}
    fitting = [a for a, length in lengths.items() if length == count]
    if axis is not None and axis in fitting:
        return vector, axis
    if axis is not None or not fitting:
        expected = lengths[axis] if axis is not None else f"{out} or {inner}"
        problems.append(f"{path}: the magnitude has {count} entries, expected {expected}")
        return None
    if len(fitting) == 2:
        assert undecided is not None, "without an axis, a list for what is open"
        undecided.append(path)
    return vector, fitting[0]


def common_axis(
    modules: Mapping[str, DoraModule], undecided: Collection[str], problems: list[str]
) -> tuple[dict[str, DoraModule], bool]:
    """The modules with one axis, and whether it is still open, for the base to decide.

    No trainer mixes axes: one layer whose shape says which speaks for the square ones too.
    """
    # An embedding's magnitude is on the axis that its kind says.
    layers = {p: m for p, m in modules.items() if m.kind is not LayerKind.EMBEDDING}
    by_axis = {
        layer.axis: path
        for path, layer in layers.items()
        if layer.magnitude is not None and path not in undecided
    }
    if len(by_axis) > 1:
        problems.append(
            f"the magnitude of {by_axis[MagnitudeAxis.IN]} is one per input, that of "
            f"{by_axis[MagnitudeAxis.OUT]} one per output: say which is meant with --axis"
        )
    if len(by_axis) != 1:
        return dict(modules), bool(undecided) and not by_axis
    (axis,) = by_axis
    decided = {path: replace(modules[path], axis=axis) for path in undecided if path in modules}
    return {**modules, **decided}, False


def check_replaced(replaced: Mapping[str, TensorRef], problems: list[str]) -> None:
    """Tensors that were trained whole must be floats, and hold some."""
    for name, ref in replaced.items():
        if 0 in ref.spec.shape or not ref.stored.dtype.is_weight:
            problems.append(f"{name}: {list(ref.spec.shape)} {ref.stored.dtype.label} is no weight")


def usable(path: str, tensors: tuple[TensorRef, ...], problems: list[str]) -> bool:
    """Whether all are floats that hold something, or the reason in `problems`."""
    before = len(problems)
    for ref in tensors:
        if not ref.stored.dtype.is_weight:
            problems.append(f"{path}: {ref.stored.name} is {ref.stored.dtype.label}, not a float")
        elif ref.spec.numel == 0 or not ref.spec.shape:
            problems.append(
                f"{path}: {ref.stored.name} is empty {list(ref.spec.shape)}: it was saved before "
                "it was gathered from the training processes (ZeRO-3)"
            )
    return len(problems) == before


def _shapes(down: TensorRef, up: TensorRef) -> str:
    return f"{list(down.spec.shape)} and {list(up.spec.shape)}"
