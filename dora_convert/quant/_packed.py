"""Integers in 32-bit words along a row, lowest bits first: `pack-quantized` of compressed-tensors.

Source: compressed-tensors 0.20, `compressors/pack_quantized`. A code is stored with half the range
added. Zero points, where there are any, are packed along the out axis instead.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._compressed import Codes, document, group_codes, group_scales, groups
from dora_convert.quant._grids import TORCH
from dora_convert.quant._linear import check_matrix
from dora_convert.quant._scheme import SinglePass, reject, shown

__all__ = ["PackedCodes", "pack_words", "unpack_words"]

_LAYOUT = "pack-quantized"
_GROUP = 128


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[n, in]` from 0 to 2^bits - 1 as int32 `[n, ceil(in * bits / 32)]`; bits 2, 4 or 8."""
    each = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).to(torch.int32)
    words = padded.new_zeros(codes.shape[0], padded.shape[1] // each)
    for i in range(each):
        words |= padded[:, i::each] << (i * bits)
    return words


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Undo `pack_words`: int32 `[n, words]` to int32 codes `[n, words * 32 / bits]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return codes.view(words.shape[0], -1)


class PackedCodes(SinglePass):
    """Weights of `bits` bits in groups of 128 along the row; reads any group, with zero points."""

    folds = ("scale",)

    def __init__(self, title: str, bits: int) -> None:
        self.title = title
        self._bits = bits
        self._half = 1 << (bits - 1)
        # In 8 bits the codes of new scales hold more of the direction, and of all together.
        self.folds_best = bits < 8
        self._codes = Codes(-self._half, self._half - 1, torch.int8)
        self._each = 32 // bits

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        return any(
            layout == _LAYOUT and weights.get("num_bits") == self._bits
            for layout, weights in groups(config)
        )

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`; the shape is read from `weight_shape`."""
        problems: list[str] = []
        found = {}
        for stored, packed in tensors.items():
            if not stored.endswith(".weight_packed") or packed.dtype is not DType.I32:
                continue
            name = stored.removesuffix("_packed")
            shape = _shape(name, tensors, load)
            if shape is None:
                problems.append(f"{name}_shape is missing or holds no two numbers")
            elif packed.shape == (shape[0], -(-shape[1] // self._each)):
                weight = self._weight(name, shape, packed, tensors, problems)
                if weight is not None:
                    found[name] = weight
            elif packed.numel * 32 < shape[0] * shape[1]:
                problems.append(f"{stored} {shown(packed)} does not hold {list(shape)}")
        reject(self.title, problems)
        return found

    def _weight(
        self,
        name: str,
        shape: tuple[int, int],
        packed: TensorSpec,
        tensors: Mapping[str, TensorSpec],
        problems: list[str],
    ) -> QuantizedWeight | None:
        scale, zero = tensors.get(f"{name}_scale"), tensors.get(f"{name}_zero_point")
        if f"{name}_g_idx" in tensors:
            problems.append(f"{name}_g_idx: groups in another order are not known")
            return None
        if scale is None or scale.dtype not in TORCH or scale.shape[:1] != shape[:1]:
            problems.append(f"{name}_scale is {shown(scale) if scale else 'missing'}")
            return None
        if len(scale.shape) != 2 or not scale.shape[1] or shape[1] % scale.shape[1]:
            problems.append(f"{name}_scale {shown(scale)} does not divide {list(shape)}")
            return None
        parts = {"packed": packed, "scale": scale}
        if zero is not None:
            if zero.shape != (-(-shape[0] // self._each), scale.shape[1]):
                problems.append(f"{name}_zero_point {shown(zero)} does not fit {list(shape)}")
                return None
            parts["zero"] = zero
        width = shape[1] // scale.shape[1]
        return QuantizedWeight(TensorSpec(name, scale.dtype, shape), parts, {"width": width})

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """See `Dequantizer.windows`."""
        rows = Window(start, stop)
        found: dict[str, Window | None] = {"packed": rows, "scale": rows}
        if "zero" in weight.parts:
            found["zero"] = Window(start // self._each, -(-stop // self._each))
        return found

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        codes = unpack_words(parts["packed"], self._bits)[:, : weight.columns].float()
        grouped = codes.view(stop - start, -1, weight.settings["width"])
        if "zero" in parts:
            zeros = unpack_words(parts["zero"].t().contiguous(), self._bits).t()
            first = start // self._each * self._each
            # Half the range was added to both.
            grouped -= zeros[start - first : stop - first].float().unsqueeze(2)
        else:
            grouped -= self._half
        grouped *= parts["scale"].float().unsqueeze(2)
        return grouped.view(codes.shape)

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`."""
        check_matrix(dense, self.title, columns=_GROUP)
        rows, columns = dense.shape
        name = dense.name
        parts = {
            "packed": TensorSpec(f"{name}_packed", DType.I32, (rows, columns // self._each)),
            "scale": TensorSpec(f"{name}_scale", dense.dtype, (rows, columns // _GROUP)),
            "shape": TensorSpec(f"{name}_shape", DType.I64, (2,)),
        }
        return QuantizedWeight(dense, parts, {"width": _GROUP})

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        return self.quantize_under(weight, rows, {"scale": group_scales(rows, self._codes, _GROUP)})

    def quantize_under(
        self, weight: QuantizedWeight, rows: Tensor, scales: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """See `Folding.quantize_under`."""
        scale_type = TORCH[weight.parts["scale"].dtype]
        values, scale = group_codes(rows, scales["scale"], self._codes, scale_type)
        return {"packed": pack_words(values.int() + self._half, self._bits), "scale": scale}

    def constants(
        self, weight: QuantizedWeight, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The shape, which the packed words do not tell."""
        return {"shape": torch.tensor(weight.dense.shape, dtype=torch.int64)}

    def config(self, kept_dense: Sequence[str]) -> Json:
        """See `Quantizer.config`."""
        weights = {
            "num_bits": self._bits,
            "type": "int",
            "group_size": _GROUP,
            "strategy": "group",
        }
        return document(_LAYOUT, weights, kept_dense)


def _shape(
    name: str, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
) -> tuple[int, int] | None:
    spec = tensors.get(f"{name}_shape")
    if spec is None or spec.numel != 2 or spec.dtype not in (DType.I64, DType.I32):
        return None
    rows, columns = struct.unpack("<2q" if spec.dtype is DType.I64 else "<2i", load(spec.name))
    return (rows, columns) if rows > 0 and columns > 0 else None
