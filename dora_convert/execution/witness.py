"""Tensors as safetensors, gguf and torch read them, to check what this package's reader gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dora_convert import quant
from dora_convert.core.extras import required
from dora_convert.core.protocols import Quantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import (
    Encoded,
    Narrowed,
    Permuted,
    Pickled,
    Slice,
    TensorRef,
    stored_name,
)
from dora_convert.execution.handles import handle
from dora_convert.storage.dtypes import TORCH
from dora_convert.storage.weights import GGUF

__all__ = ["requantised", "rows_of", "source_rows", "stored_rows", "whole", "whole_rows"]


def rows_of(file: Path, name: str, rows: Sequence[int]) -> Tensor:
    """Rows of a stored tensor as a matrix, by safetensors' own reader."""
    stored = handle(file).get_slice(stored_name(name))
    if len(rows) == rows[-1] - rows[0] + 1:
        found: Tensor = stored[rows[0] : rows[-1] + 1]
    else:
        found = torch.cat([stored[i : i + 1] for i in rows])
    return found.reshape(len(rows), -1)


def _unpickled(source: Pickled) -> Tensor:
    loaded: Mapping[str, Tensor] = torch.load(
        source.file,
        weights_only=True,
        map_location="cpu",
        # Old files are no zip archives and cannot be mapped.
        mmap=_is_archive(source.file),
    )
    return loaded[source.key].detach()


def _is_archive(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def source_rows(ref: TensorRef, rows: Sequence[int]) -> Tensor:
    """Rows of a plan's source as a matrix; float32 where they are decoded."""
    if not ref.is_contiguous or ref.spec.shape[:1] != ref.stored.shape[:1]:
        return _viewed(ref).reshape(ref.spec.shape[0], -1)[list(rows)]
    if isinstance(ref.source, Encoded):
        return torch.cat([_decoded(ref.source, *run) for run in _runs(rows)])
    if isinstance(ref.source, Pickled):
        stored = _unpickled(ref.source)
        return stored.reshape(ref.spec.shape[0], -1)[list(rows)]
    return rows_of(ref.source.file, ref.stored.name, rows)


def whole(ref: TensorRef) -> Tensor:
    """A small tensor in float64, its view applied."""
    return _viewed(ref).double()


def whole_rows(ref: TensorRef, rows: Sequence[int]) -> Tensor:
    """Some rows of the same: of a factor of an embedding all of it is not small any more."""
    return _viewed(ref)[list(rows)].double()


def _viewed(ref: TensorRef) -> Tensor:
    result: Tensor
    if isinstance(ref.source, Pickled):
        result = _unpickled(ref.source)
    elif isinstance(ref.source, Encoded):
        result = _decoded(ref.source, 0, ref.stored.shape[0])
    else:
        result = handle(ref.source.file).get_tensor(ref.stored.name)
    for step in ref.view:
        match step:
            case Permuted(axes):
                result = torch.permute(result, axes)
            case Narrowed(axis, start, stop):
                result = result.index_select(axis, torch.arange(start, stop))
            case _:
                result = result.reshape(step.shape)
    return result


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Row numbers, rising, as ranges."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def _decoded(source: Encoded, start: int, stop: int) -> Tensor:
    """The scheme's own arithmetic; what it is given was read by another reader."""
    scheme = quant.decoder(source)
    windows = scheme.windows(source.weight, start, stop)
    parts = {role: _part(source.parts[role], window) for role, window in windows.items()}
    return scheme.dequantize(source.weight, parts, start, stop)


def _part(ref: TensorRef, window: Window | None) -> Tensor:
    if not isinstance(ref.source, Slice) or ref.view:
        seen = _viewed(ref)
        return seen if window is None else seen.narrow(0, window.start, window.stop - window.start)
    if ref.source.file.suffix == GGUF:
        return _of_gguf(ref, ref.source.file, window)
    stored = handle(ref.source.file).get_slice(ref.stored.name)
    as_seen = tuple(stored.get_shape()) == ref.spec.shape
    if window is not None and window.axis == 0 and as_seen:
        rows: Tensor = stored[window.start : window.stop]
        return rows.view(TORCH[ref.spec.dtype])
    whole: Tensor = handle(ref.source.file).get_tensor(ref.stored.name)
    seen = whole.view(-1).view(TORCH[ref.spec.dtype]).view(ref.spec.shape)
    if window is None:
        return seen
    return seen.narrow(window.axis, window.start, window.stop - window.start)


def _of_gguf(ref: TensorRef, file: Path, window: Window | None) -> Tensor:
    """Rows of it by gguf's own reader."""
    state = file.stat()
    data = _gguf_bytes(file, state.st_size, state.st_mtime_ns)[ref.stored.name]
    start, stop = (window.start, window.stop) if window else (0, ref.spec.shape[0])
    size = ref.spec.row_bytes
    rows = torch.from_numpy(np.array(data[start * size : stop * size]))
    return rows.view(TORCH[ref.spec.dtype]).view(stop - start, *ref.spec.shape[1:])


@lru_cache(maxsize=8)
def _gguf_bytes(file: Path, size: int, mtime: int) -> dict[str, np.ndarray]:
    """Every tensor's bytes, mapped; a file that was written anew is read anew."""
    reader = required("gguf", "gguf", "a GGUF file").GGUFReader(file)
    return {tensor.name: tensor.data.reshape(-1).view(np.uint8) for tensor in reader.tensors}


def stored_rows(
    scheme: str, weight: QuantizedWeight, files: Mapping[str, Path], rows: range
) -> Tensor:
    """Rows of a quantised weight as a finished file has them, decoded to float32."""
    parts = {
        role: TensorRef(spec, Slice(files[spec.name], 0), spec)
        for role, spec in weight.parts.items()
    }
    return _decoded(Encoded(scheme, weight, parts), rows.start, rows.stop)


def requantised(scheme: Quantizer, weight: QuantizedWeight, rows: Tensor) -> Tensor:
    """What some rows become when they are stored in the scheme as a weight of their own."""
    return quant.rounded_alone(scheme, weight, rows)[1]
