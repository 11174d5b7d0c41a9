"""A module's tensors for some of its rows, read and in the working type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_convert.core import deltas as stored
from dora_convert.core.adapter import MagnitudeAxis
from dora_convert.core.plan import Piece
from dora_convert.core.tensors import TensorRef
from dora_convert.maths.deltas import Delta, Dense, Factor, Hadamard, Kronecker, LowRank
from dora_convert.storage.reader import Reader

__all__ = ["Operands"]


@dataclass(frozen=True, slots=True)
class Operands:
    """A module's update for some of its rows, scaled, and its magnitude."""

    delta: Delta | None  # [rows, in]
    magnitude: Tensor | None  # [rows] for axis OUT, one per input channel for IN

    @staticmethod
    def load(reader: Reader, piece: Piece, start: int, stop: int, dtype: torch.dtype) -> Operands:
        """Those of rows `start:stop` of the output, which lie inside the piece, on the CPU."""
        module = piece.module
        a, b = start - piece.start + piece.offset, stop - piece.start + piece.offset
        delta = magnitude = None
        if module.delta is not None:
            delta = _Loading(reader, dtype, a, b).delta(module.delta, module.scaling)
        if module.magnitude is not None:
            magnitude = reader.load(module.magnitude).to(dtype)
            if module.axis is MagnitudeAxis.OUT:
                magnitude = magnitude[a:b]
        return Operands(delta, magnitude)

    def on(self, device: torch.device) -> Operands:
        """The same operands there."""
        if device.type == "cpu":
            return self
        delta = None if self.delta is None else self.delta.to(device)
        return Operands(delta, None if self.magnitude is None else self.magnitude.to(device))


@dataclass(frozen=True, slots=True)
class _Loading:
    """How the rows `start:stop` of an update are loaded."""

    reader: Reader
    dtype: torch.dtype
    start: int
    stop: int

    def delta(self, delta: stored.Delta, scaling: float) -> Delta:
        match delta:
            case stored.Hadamard(left, right):
                return Hadamard(self._rows(left, scaling), self._rows(right, 1.0))
            case stored.Kronecker(left, right):
                factors = self._factor(left, scaling), self._factor(right, 1.0)
                return Kronecker(*factors, self.start, self.stop - self.start)
            case stored.LowRank() | stored.Tucker():
                return self._rows(delta, scaling)

    def _rows(self, product: stored.Factored, scaling: float) -> LowRank:
        up = self.reader.load_rows(product.up, self.start, self.stop)
        return LowRank(up.to(self.dtype) * scaling, self._down(product))

    def _factor(self, factor: TensorRef | stored.Factored, scaling: float) -> Factor:
        """All rows of it."""
        if isinstance(factor, TensorRef):
            return Dense(self._whole(factor) * scaling)
        return LowRank(self._whole(factor.up) * scaling, self._down(factor))

    def _down(self, product: stored.Factored) -> Tensor:
        """`[rank, in]`, or `[rank, in * k...]`."""
        down = self._whole(product.down)
        if isinstance(product, stored.Tucker):
            down = torch.einsum("mn...,ni->mi...", self._whole(product.mid), down).flatten(1)
        return down.contiguous()

    def _whole(self, ref: TensorRef) -> Tensor:
        return self.reader.load(ref).to(self.dtype)
