"""Bytes of tensors into memory: whole small ones, or row blocks of large ones, always by pread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import Window
from dora_convert.core.tensors import (
    Encoded,
    Narrowed,
    Permuted,
    Pickled,
    Slice,
    Step,
    TensorRef,
    TensorSpec,
)
from dora_convert.errors import InputError
from dora_convert.storage.dtypes import TORCH
from dora_convert.storage.opening import opened
from dora_convert.storage.pickled import open_pickle
from dora_convert.storage.sparse import require

__all__ = ["DecodedBlocks", "Lane", "Reader", "RowBlocks"]

_ALIGNED = 64  # bytes: where a part may begin beside others


class Lane(Protocol):
    """The way from here to where a worker computes; `execution.lanes.Buffers` is one."""

    @property
    def device(self) -> torch.device:
        """Where that is."""

    def landing(self, kind: str, nbytes: int) -> Tensor:
        """Memory on the host to read a block into, uint8, that belongs to `kind`."""

    def upload(self, kind: str, stored: Tensor) -> Tensor:
        """A block `[rows, columns]` that was read, on the device."""


class _Here:
    """Of who keeps what was read, on the CPU: memory of its own for every block."""

    device = torch.device("cpu")

    def landing(self, kind: str, nbytes: int) -> Tensor:
        """See `Lane`."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def upload(self, kind: str, stored: Tensor) -> Tensor:
        """See `Lane`."""
        return stored


class RowBlocks:
    """Row blocks of one stored matrix, read into a caller's buffer."""

    def __init__(self, ref: TensorRef, fd: int | None, whole: Tensor | None) -> None:
        self._ref = ref
        self._fd = fd
        self._whole = whole
        self._view: tuple[int, Tensor, Tensor, Tensor] | None = None

    def spans(
        self, start: int, stop: int, nbytes: int, *, multiple: int = 1
    ) -> Iterator[tuple[int, int]]:
        """Cuts of rows `start:stop`, each of at most `nbytes`, or of `multiple` rows if larger."""
        step = max(1, nbytes // max(self._ref.spec.row_bytes, 1) // multiple) * multiple
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def read(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """Rows `start:stop` in their stored element type; `buffer` is uint8, and large enough."""
        if self._whole is not None:
            return self._whole[start:stop]
        assert self._fd is not None
        assert isinstance(self._ref.source, Slice)
        rows = stop - start
        if self._view is None or self._view[0] != rows or self._view[1] is not buffer:
            target = buffer[: rows * self._ref.spec.row_bytes]
            shape = (rows, *self._ref.spec.shape[1:])
            self._view = rows, buffer, target, target.view(TORCH[self._ref.spec.dtype]).view(shape)
        _, _, target, matrix = self._view
        offset = self._ref.source.start + start * self._ref.spec.row_bytes
        _pread_into(self._fd, self._ref.source.file, target, offset)
        return matrix

    def fetch(self, start: int, stop: int, lane: Lane, kind: str = "raw") -> Tensor:
        """The same rows where the lane computes, until the next of the same kind are fetched."""
        raw = lane.landing(kind, self._ref.spec.row_bytes * (stop - start))
        return lane.upload(kind, self.read(start, stop, raw))


class DecodedBlocks(RowBlocks):
    """Row blocks of a quantised matrix, float32; parts that belong to no row are read once.

    They are decoded where the lane computes, but for what the scheme needs on the host.
    """

    def __init__(self, ref: TensorRef, reader: Reader, scheme: Dequantizer) -> None:
        super().__init__(ref, None, None)
        assert isinstance(ref.source, Encoded)
        self._source = ref.source
        self._reader = reader
        self._scheme = scheme
        self._shared: dict[str, Tensor] = {}

    def read(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """Rows `start:stop` as the scheme decodes them; `buffer` is not used."""
        return self.fetch(start, stop, _Here())

    def fetch(self, start: int, stop: int, lane: Lane, kind: str = "raw") -> Tensor:
        """See `RowBlocks`; all parts of a block go in one copy."""
        weight, scheme = self._source.weight, self._scheme
        parts: dict[str, Tensor] = {}
        moving: dict[str, Window] = {}
        for role, window in scheme.windows(weight, start, stop).items():
            if window is None:
                parts[role] = self._shared_part(role, lane)
            elif role in scheme.on_host:
                parts[role] = self._part(role, window)
            else:
                moving[role] = window
        if moving:
            parts |= self._landed(moving, lane, kind)
        values = scheme.dequantize(weight, parts, start, stop)
        there = values.device.type == lane.device.type
        return values if there else lane.upload(kind, values)

    def _shared_part(self, role: str, lane: Lane) -> Tensor:
        if role not in self._shared:
            held = self._reader.load(self._source.parts[role])
            self._shared[role] = held if role in self._scheme.on_host else held.to(lane.device)
        return self._shared[role]

    def _landed(self, windows: Mapping[str, Window], lane: Lane, kind: str) -> dict[str, Tensor]:
        """Parts of a block, side by side in the memory of its kind."""
        found, places, end = {}, {}, 0
        for role, window in windows.items():
            spec = self._source.parts[role].spec
            length = window.stop - window.start
            shape = (*spec.shape[: window.axis], length, *spec.shape[window.axis + 1 :])
            kept = TensorSpec(spec.name, spec.dtype, shape)
            start = -(-end // _ALIGNED) * _ALIGNED
            end = start + kept.nbytes
            places[role] = kept, start, end
        raw = lane.landing(kind, end)[:end]
        for role, (_, start, stop) in places.items():
            self._read_part(role, windows[role], raw[start:stop])
        data = lane.upload(kind, raw.unsqueeze(0)).view(-1)
        for role, (kept, start, stop) in places.items():
            found[role] = data[start:stop].view(TORCH[kept.dtype]).view(kept.shape)
        return found

    def _read_part(self, role: str, window: Window, target: Tensor) -> None:
        ref = self._source.parts[role]
        if window.axis == 0 and isinstance(ref.source, Slice) and ref.is_contiguous:
            offset = ref.source.start + window.start * ref.spec.row_bytes
            with opened(ref.source.file) as (fd, _):
                _pread_into(fd, ref.source.file, target, offset)
        else:
            part = self._part(role, window)
            target.view(part.dtype).view(part.shape).copy_(part)

    def _part(self, role: str, window: Window) -> Tensor:
        ref = self._source.parts[role]
        if window.axis == 0:
            return self._reader.load_rows(ref, window.start, window.stop)
        whole = self._reader.load(ref)
        return whole.narrow(window.axis, window.start, window.stop - window.start)


class Reader:
    """Opens each pickle once; everything else is opened where it is read. Safe for threads.

    `decoder` gives what decodes a quantised tensor.
    """

    def __init__(self, decoder: Callable[[Encoded], Dequantizer] | None = None) -> None:
        self._decoder = decoder
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def load(self, ref: TensorRef) -> Tensor:
        """The whole tensor, its view applied, in its stored element type."""
        stored = self._stored(ref)
        if isinstance(ref.source, Encoded):
            stored = stored.to(TORCH[ref.stored.dtype])
        return _turned(stored, ref.view)

    def load_rows(self, ref: TensorRef, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a matrix, reading those alone where its view allows."""
        if start == 0 and stop == ref.spec.shape[0]:
            return self.load(ref)
        if isinstance(ref.source, Slice) and ref.is_contiguous:
            with self.rows(ref) as blocks:
                size = ref.spec.row_bytes * (stop - start)
                return blocks.read(start, stop, torch.empty(size, dtype=torch.uint8))
        if isinstance(ref.source, Slice) and ref.view == (Permuted((1, 0)),):
            return self._columns(ref, ref.source, start, stop).T
        return self.load(ref)[start:stop]

    @contextmanager
    def rows(self, ref: TensorRef) -> Iterator[RowBlocks]:
        """Row blocks of a tensor; one whose rows do not lie one after the other is read whole."""
        if isinstance(ref.source, Slice) and ref.is_contiguous:
            with opened(ref.source.file) as (fd, _):
                yield RowBlocks(ref, fd, None)
        elif isinstance(ref.source, Encoded) and ref.is_contiguous:
            yield DecodedBlocks(ref, self, self._decoder_of(ref.source))
        else:
            yield RowBlocks(ref, None, _turned(self._stored(ref), ref.view))

    def _decoder_of(self, source: Encoded) -> Dequantizer:
        assert self._decoder is not None, source
        return self._decoder(source)

    def _stored(self, ref: TensorRef) -> Tensor:
        if isinstance(ref.source, Encoded):
            blocks = DecodedBlocks(ref, self, self._decoder_of(ref.source))
            return blocks.read(0, ref.stored.shape[0], torch.empty(0))
        if isinstance(ref.source, Pickled):
            return self._pickle(ref.source.file)[ref.source.key]
        data = torch.empty(ref.stored.nbytes, dtype=torch.uint8)
        with opened(ref.source.file) as (fd, _):
            _pread_into(fd, ref.source.file, data, ref.source.start)
        return data.view(TORCH[ref.stored.dtype]).view(ref.stored.shape)

    def _columns(self, ref: TensorRef, source: Slice, start: int, stop: int) -> Tensor:
        """Columns `start:stop` of the stored matrix, one read for each stored row."""
        rows, columns = ref.stored.shape
        size = ref.stored.dtype.bits // 8
        data = torch.empty((rows, (stop - start) * size), dtype=torch.uint8)
        with opened(source.file) as (fd, _):
            for i in range(rows):
                offset = source.start + (i * columns + start) * size
                _pread_into(fd, source.file, data[i], offset)
        return data.view(TORCH[ref.stored.dtype])

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        with self._lock:
            if file not in self._pickles:
                self._pickles[file] = open_pickle(file)
            return self._pickles[file]


def _turned(tensor: Tensor, view: tuple[Step, ...]) -> Tensor:
    for step in view:
        match step:
            case Permuted(axes):
                tensor = tensor.permute(axes)
            case Narrowed(axis, start, stop):
                tensor = tensor.narrow(axis, start, stop - start)
            case _:
                tensor = tensor.reshape(step.shape)
    return tensor


def _pread_into(fd: int, file: Path, target: Tensor, offset: int) -> None:
    data = target.numpy().data
    require(file, offset, offset + len(data))
    done = 0
    while done < len(data):
        count = os.preadv(fd, [data[done:]], offset + done)
        if count == 0:
            raise InputError(f"{file.name} became shorter while it was read", where=str(file))
        done += count
