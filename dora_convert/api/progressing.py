"""How far `to-lora` is, told in bytes of weights gone through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dora_convert.core.plan import Piece
from dora_convert.core.tensors import TensorRef

if TYPE_CHECKING:
    from dora_convert.core.protocols import Listener
    from dora_convert.maths.lowrank import Factors

__all__ = ["Work"]


class Work:
    """Every module's weight once, and all of them once more for every step of a fit."""

    def __init__(
        self,
        parts: Mapping[str, Sequence[tuple[TensorRef, Piece]]],
        listener: Listener,
        steps: int,
    ) -> None:
        self._listener = listener
        self._nbytes = {
            path: sum((piece.stop - piece.start) * base.spec.row_bytes for base, piece in pieces)
            for path, pieces in parts.items()
        }
        self._whole = sum(self._nbytes.values())
        listener.started(self._whole * (1 + steps))

    def watched(self, keep: Callable[[str, Factors], None]) -> Callable[[str, Factors], None]:
        """The same, and the module counts as done."""

        def kept(path: str, factors: Factors) -> None:
            keep(path, factors)
            self._listener.advanced(self._nbytes[path])

        return kept

    def step(self) -> None:
        """A step of a fit is done."""
        self._listener.advanced(self._whole)
