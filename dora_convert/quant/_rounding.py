"""Rows as a scheme would give them back: quantised and decoded at once, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from dora_convert.core.protocols import Dequantizer, Folding, Quantizer
from dora_convert.core.quantized import QuantizedWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["DENSE", "WHOLE", "decoded_block", "placed", "rounded", "rounded_alone"]

# The roles of a matrix that is rounded as it is read: the rows asked for, and all of it.
DENSE: Final = "dense"
WHOLE: Final = "whole"


def decoded_block(
    scheme: Quantizer,
    weight: QuantizedWeight,
    start: int,
    stop: int,
    parts: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
) -> Tensor:
    """Rows `start:stop`, float32, from what `quantize` made of them and the whole `constants`."""
    needed = {}
    for role, window in scheme.windows(weight, start, stop).items():
        if role not in parts:
            whole = constants[role]
            needed[role] = (
                whole
                if window is None
                else whole.narrow(window.axis, window.start, window.stop - window.start)
            )
    device = next(iter(parts.values())).device
    return scheme.dequantize(weight, {**parts, **placed(scheme, needed, device)}, start, stop)


def placed(
    scheme: Dequantizer, constants: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Constants where the scheme wants them beside rows on that device."""
    return {
        role: part if role in scheme.on_host else part.to(device)
        for role, part in constants.items()
    }


def rounded(
    scheme: Quantizer,
    weight: QuantizedWeight,
    start: int,
    rows: Tensor,
    constants: Mapping[str, Tensor],
    statistic: Tensor | None,
) -> Tensor:
    """Rows of a weight from `start` on as they are read back, float32."""
    parts = scheme.quantize(weight, rows, statistic if scheme.two_pass else None)
    return decoded_block(scheme, weight, start, start + len(rows), parts, constants)


def rounded_alone(
    scheme: Quantizer,
    whole: QuantizedWeight,
    rows: Tensor,
    statistic: Tensor | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> tuple[Mapping[str, Tensor], Tensor]:
    """The parts that some rows of `whole` become as a weight of their own, and their decoding.

    A scheme of two passes is given the `statistic` of the whole, if there is one; `scales` are
    those that the rows have already, if they have any.
    """
    shape = (len(rows), *(whole.shape or whole.dense.shape)[1:])
    weight = scheme.layout(replace(whole.dense, shape=shape))
    if statistic is None or not scheme.two_pass:
        statistic = scheme.gather([scheme.survey(rows)]) if scheme.surveys else None
    if scales:
        assert isinstance(scheme, Folding)
        parts = scheme.quantize_under(weight, rows, scales)
    else:
        parts = scheme.quantize(weight, rows, statistic if scheme.two_pass else None)
    # On the host, where the library that makes some of them is at home.
    constants = scheme.constants(weight, None if statistic is None else statistic.cpu())
    return parts, decoded_block(scheme, weight, 0, len(rows), parts, constants)
