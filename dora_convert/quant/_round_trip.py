"""A dense weight as it was in training on a quantised base: quantised, and decoded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Quantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import TensorSpec
from dora_convert.quant._grids import TORCH
from dora_convert.quant._rounding import DENSE, WHOLE, rounded

__all__ = ["RoundTrip"]

_SURVEY_ELEMENTS = 1 << 22


class RoundTrip:
    """Decodes one weight whose stored part is the dense matrix itself, seen under two roles.

    `DENSE` are the rows asked for; `WHOLE` is all of it, needed once by a scheme with a statistic.
    """

    on_host: tuple[str, ...] = (WHOLE,)  # surveyed once, whatever the device

    def __init__(self, scheme: Quantizer) -> None:
        self.title = scheme.title
        self._scheme = scheme
        self._constants: tuple[Mapping[str, Tensor], Tensor | None] | None = None

    def detect(self, config: Json) -> bool:
        """No config says it."""
        return False

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """No tensor shows it."""
        return {}

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """The rows and those that share a tile or a block with them."""
        multiple = self._scheme.row_multiple(self._scheme.layout(weight.dense))
        last = min(-(-stop // multiple) * multiple, weight.rows)
        found: dict[str, Window | None] = {DENSE: Window(start // multiple * multiple, last)}
        if self._scheme.surveys and self._constants is None:
            found[WHOLE] = None
        return found

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`; in the values that the scheme's own library returns."""
        scheme, dense = self._scheme, weight.dense
        layout = scheme.layout(dense)
        if self._constants is None:
            statistic = self._survey(parts[WHOLE]) if scheme.surveys else None
            self._constants = scheme.constants(layout, statistic), statistic
        constants, statistic = self._constants
        first = start - start % scheme.row_multiple(layout)
        decoded = rounded(scheme, layout, first, parts[DENSE], constants, statistic)
        decoded = decoded[start - first : stop - first]
        return decoded.to(TORCH[scheme.returns or dense.dtype]).float()

    def _survey(self, whole: Tensor) -> Tensor:
        scheme, columns = self._scheme, max(whole.shape[1], 1)
        # 64 rows end a block of any width.
        step = max(1, _SURVEY_ELEMENTS // columns // 64) * 64
        starts = range(0, len(whole), step)
        return scheme.gather([scheme.survey(whole[a : a + step]) for a in starts])
