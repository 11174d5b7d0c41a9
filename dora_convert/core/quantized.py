"""A matrix in a quantisation scheme, as data: what it stands for, and the tensors it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dora_convert.core.tensors import TensorSpec

__all__ = ["DECLARED_IN", "QuantizedWeight", "Window"]

# Where a config says that its weights are quantised, and what by if it does not say.
DECLARED_IN = {
    "quantization_config": "unknown",
    "compression_config": "compressed-tensors",
    "quantization": "mlx",
}


@dataclass(frozen=True, slots=True)
class Window:
    """Entries `start:stop` of one axis of a part."""

    start: int
    stop: int
    axis: int = 0


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`dense` is the `[out, in]` matrix meant, in the type that the scheme's own library returns.

    `parts` are the stored tensors by role. A part's dtype and shape say how its bytes are to be
    seen; that may be another view of the same row-major bytes than the file's header gives.
    `settings` are the numbers that the parts alone do not tell, such as a group size. `shape` is
    how a dense checkpoint has the same row-major elements, where that is no matrix.
    """

    dense: TensorSpec
    parts: Mapping[str, TensorSpec]
    settings: Mapping[str, int] = field(default_factory=dict)
    shape: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Length of the out axis."""
        return self.dense.shape[0]

    @property
    def columns(self) -> int:
        """Length of the in axis."""
        return self.dense.shape[1]
