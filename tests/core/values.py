"""Adapters and checkpoints as values: headers only, there are no files behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_convert.core.adapter import Adapter, DoraModule, MagnitudeAxis
from dora_convert.core.bundle import Bundle, Checkpoint
from dora_convert.core.deltas import LowRank
from dora_convert.core.tensors import DType, Slice, TensorRef, TensorSpec

Shapes = Mapping[str, Sequence[int]]
NOWHERE = Path("nowhere")


def ref(name: str, *shape: int, dtype: DType = DType.F32) -> TensorRef:
    spec = TensorSpec(name, dtype, shape)
    return TensorRef(spec, Slice(NOWHERE / "file.safetensors", 0), spec)


def refs(shapes: Shapes, dtype: DType = DType.F32) -> dict[str, TensorRef]:
    return {name: ref(name, *shape, dtype=dtype) for name, shape in shapes.items()}


def bundle(tensors: Mapping[str, TensorRef] | Shapes, config: Mapping[str, Any] | None) -> Bundle:
    held = {n: t if isinstance(t, TensorRef) else ref(n, *t) for n, t in tensors.items()}
    return Bundle(NOWHERE, held, {} if config is None else {"adapter_config.json": config})


def checkpoint(
    shapes: Mapping[str, TensorRef] | Shapes,
    config: Mapping[str, Any] | None = None,
    *,
    shards: Mapping[str, str] | None = None,
    files: Sequence[str] = ("config.json",),
    dtype: DType = DType.F32,
) -> Checkpoint:
    held = {
        n: t if isinstance(t, TensorRef) else ref(n, *t, dtype=dtype) for n, t in shapes.items()
    }
    where = dict.fromkeys(held, "model.safetensors") | dict(shards or {})
    return Checkpoint(NOWHERE, held, where, dict(config or {}), tuple(files))


def dora(
    path: str,
    out: int,
    inner: int,
    *,
    rank: int = 4,
    axis: MagnitudeAxis = MagnitudeAxis.OUT,
    magnitude: bool = True,
    weight: TensorRef | None = None,
) -> DoraModule:
    """A module whose update is `[out, inner]`."""
    length = out if axis is MagnitudeAxis.OUT else inner
    return DoraModule(
        path,
        LowRank(ref(f"{path}.A", rank, inner), ref(f"{path}.B", out, rank)),
        ref(f"{path}.m", length) if magnitude else None,
        axis,
        2.0,
        weight,
    )


def magnitude_only(path: str, length: int) -> DoraModule:
    return DoraModule(path, None, ref(f"{path}.m", length), MagnitudeAxis.OUT, 1.0)


def adapter(*modules: DoraModule, **others: Any) -> Adapter:
    return Adapter(format="peft", modules={m.path: m for m in modules}, **others)
