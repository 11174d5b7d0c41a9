"""Stored adapter tensors to canonical parts: the checks that every format shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dora_convert.core.adapter import DoraModule, LowRank, MagnitudeAxis
from dora_convert.core.tensors import TensorRef

__all__ = ["check_axes", "check_replaced", "convolution", "linear", "magnitude"]


def linear(path: str, down: TensorRef, up: TensorRef, problems: list[str]) -> LowRank | None:
    """`down [rank, in]` and `up [out, rank]`, or None with the reason in `problems`."""
    if not _usable(path, (down, up), problems):
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
    if not _usable(path, (down, up), problems):
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
) -> tuple[TensorRef, MagnitudeAxis] | None:
    """The magnitude as a vector and its axis on the update's `shape [out, in]`.

    `axis` decides where it is given; otherwise the shape does, and where that is undecidable (a
    row vector on a square weight) it is a problem. None with the reason in `problems`.
    """
    if not _usable(path, (stored,), problems):
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
        problems.append(
            f"{path}: the magnitude {list(stored.spec.shape)} of a square weight may belong to "
            "the outputs or to the inputs: say which with --axis"
        )
        return None
    return vector, fitting[0]


def check_axes(layers: Iterable[DoraModule], problems: list[str]) -> None:
    """No trainer mixes axes: one layer whose shape says IN speaks for the square ones too."""
    by_axis = {layer.axis: layer.path for layer in layers if layer.magnitude is not None}
    if len(by_axis) > 1:
        problems.append(
            f"the magnitude of {by_axis[MagnitudeAxis.IN]} is one per input, that of "
            f"{by_axis[MagnitudeAxis.OUT]} one per output: say which is meant with --axis"
        )


def check_replaced(replaced: Mapping[str, TensorRef], problems: list[str]) -> None:
    """Tensors that were trained whole must be floats, and hold some."""
    for name, ref in replaced.items():
        if 0 in ref.spec.shape or not ref.stored.dtype.is_weight:
            problems.append(f"{name}: {list(ref.spec.shape)} {ref.stored.dtype.label} is no weight")


def _usable(path: str, tensors: tuple[TensorRef, ...], problems: list[str]) -> bool:
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
