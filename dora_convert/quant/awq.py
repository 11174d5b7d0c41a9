"""AWQ: 4-bit integers packed along the out axis, stored as `[in, out]`, groups with a zero point.

Source: AutoAWQ's gemm layout, config `quant_method: awq`. The eight columns of a word lie in the
order 0, 2, 4, 6, 1, 3, 5, 7. Read only: AWQ's gain is its calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._grids import TORCH
from dora_convert.quant._packed import unpack_words
from dora_convert.quant._scheme import reject, shown, stated

__all__ = ["QUANTIZER", "GemmAWQ"]

_BITS, _EACH = 4, 8


class GemmAWQ:
    """The gemm layout; gemv and others are refused."""

    title = "AWQ (gemm)"
    on_host: tuple[str, ...] = ()

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        return stated(config, "awq") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`."""
        words = stated(config, "awq") or {}
        problems: list[str] = []
        if words.get("bits", words.get("w_bit", _BITS)) != _BITS:
            problems.append("config.json: only 4 bits are known")
        if str(words.get("version", "gemm")).lower() != "gemm":
            problems.append(f"config.json: 'version' {words['version']!r:.40} is not known")
        found = {}
        for stored, codes in tensors.items():
            module, _, leaf = stored.rpartition(".")
            if leaf != "qweight":
                continue
            zeros, scales = tensors.get(f"{module}.qzeros"), tensors.get(f"{module}.scales")
            if zeros is None or scales is None:
                missing = "qzeros" if zeros is None else "scales"
                problems.append(f"{module}.{missing} is missing")
                continue
            if not _fit(codes, zeros, scales):
                problems.append(
                    f"{module}: qweight {shown(codes)}, qzeros {shown(zeros)}, scales "
                    f"{shown(scales)} do not fit"
                )
                continue
            shape = (codes.shape[1] * _EACH, codes.shape[0])
            dense = TensorSpec(f"{module}.weight", scales.dtype, shape)
            parts = {"codes": codes, "zeros": zeros, "scales": scales}
            found[dense.name] = QuantizedWeight(dense, parts)
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`; rows of the weight are columns of the file."""
        words = Window(start // _EACH, -(-stop // _EACH), axis=1)
        return {"codes": words, "zeros": words, "scales": Window(start, stop, axis=1)}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        skip = start % _EACH
        codes, zeros = (
            _columns(parts[role])[:, skip : skip + stop - start] for role in ("codes", "zeros")
        )
        scales = parts["scales"].float()  # [groups, n]
        grouped = codes.reshape(scales.shape[0], -1, stop - start) - zeros.unsqueeze(1)
        dense = grouped.float().mul_(scales.unsqueeze(1))
        return dense.view(weight.columns, -1).t().contiguous()


def _columns(words: Tensor) -> Tensor:
    """Codes `[k, words * 8]` in the order of the columns, which lie at 0, 4, 1, 5, 2, 6, 3, 7."""
    codes = unpack_words(words.contiguous(), _BITS)
    return codes.view(len(words), -1, 2, _EACH // 2).transpose(2, 3).reshape(len(words), -1)


def _fit(codes: TensorSpec, zeros: TensorSpec, scales: TensorSpec) -> bool:
    if any(len(spec.shape) != 2 for spec in (codes, zeros, scales)):
        return False
    groups, rows = scales.shape
    return (
        codes.dtype is zeros.dtype is DType.I32
        and scales.dtype in TORCH
        and rows == codes.shape[1] * _EACH
        and zeros.shape == (groups, codes.shape[1])
        and groups > 0
        and codes.shape[0] % groups == 0
    )


QUANTIZER: Final[Dequantizer] = GemmAWQ()
