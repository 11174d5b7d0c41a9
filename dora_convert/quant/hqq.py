"""HQQ: 1 to 8 bits in groups along an axis, each with a scale and a zero point of its own.

Source: hqq 0.2.8 (`core/quantize.py`, `core/bitpack.py`), as transformers saves it; config
`quant_method: hqq`. The weight is laid out as a matrix of groups, `[groups, group]` for axis 1 and
`[group, groups]` for axis 0, in row-major order of the weight itself. Its rows are packed in as
many equal parts as codes fit into a word, the first part in the highest bits. Read only: servers
do not load it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._grids import TORCH
from dora_convert.quant._scheme import reject, shown, stated

__all__ = ["QUANTIZER", "GroupedHQQ"]

_CODES = "W_q"
_EACH = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # codes in a word: of 8 bits, for 3 bits of 32
_NUMBERS = ("nbits", "group_size", "axis", "shape")
_FLAGS = ("quant_scale", "quant_zero")


class GroupedHQQ:
    """Scales and zero points that are quantised themselves are refused."""

    title = "HQQ"
    on_host: tuple[str, ...] = ()

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        return stated(config, "hqq") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`; bits, groups and shape are read from tensors beside the codes."""
        problems: list[str] = []
        found = {}
        for stored, codes in tensors.items():
            module, _, leaf = stored.rpartition(".")
            if leaf == _CODES:
                weight = _weight(module, codes, tensors, load, problems)
                if weight is not None:
                    found[weight.dense.name] = weight
        reject(self.title, problems)
        return found

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """See `Dequantizer.windows`; rows of a weight may lie in several parts of the words."""
        if weight.settings["axis"] == 0:
            return {"codes": None, "scale": None, "zero": None}
        group = weight.settings["group"]
        groups = Window(start * weight.columns // group, -(-stop * weight.columns // group))
        return {"codes": None, "scale": groups, "zero": groups}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`; rounded after each step, as the library computes it."""
        first, last = start * weight.columns, stop * weight.columns
        values = _unpacked(parts["codes"], weight.settings["bits"], first, last)
        values = values.to(parts["scale"].dtype)
        if weight.settings["axis"] == 0:
            place = torch.arange(first, last, device=values.device) % weight.parts["scale"].numel
        else:
            group = weight.settings["group"]
            places = torch.arange(first, last, device=values.device)
            place = places // group - first // group
        scale, zero = (parts[role].view(-1)[place] for role in ("scale", "zero"))
        return values.sub_(zero).mul_(scale).float().view(stop - start, weight.columns)


def _unpacked(words: Tensor, bits: int, first: int, last: int) -> Tensor:
    """Codes `first:last` of the packed matrix, in row-major order."""
    flat, each = words.view(-1), _EACH[bits]
    pieces = []
    for part in range(first // len(flat), -(-last // len(flat))):
        a, b = (min(max(n - part * len(flat), 0), len(flat)) for n in (first, last))
        pieces.append((flat[a:b] >> (bits * (each - 1 - part))) & ((1 << bits) - 1))
    return torch.cat(pieces)


def _weight(
    module: str,
    codes: TensorSpec,
    tensors: Mapping[str, TensorSpec],
    load: Callable[[str], bytes],
    problems: list[str],
) -> QuantizedWeight | None:
    names = [*_NUMBERS, *_FLAGS, "scale", "zero"]
    missing = [name for name in names if f"{module}.{name}" not in tensors]
    if missing:
        problems.append(f"{module}: {', '.join(missing)} missing")
        return None
    given = {name: _numbers(tensors[f"{module}.{name}"], load) for name in (*_NUMBERS, *_FLAGS)}
    if any(given[name] != (0,) for name in _FLAGS):
        problems.append(f"{module}: scales that are quantised themselves are not known")
        return None
    bits, group, axis = (next(iter(given[name] or ()), -1) for name in _NUMBERS[:3])
    shape = given["shape"] or ()
    if bits not in _EACH or axis not in (0, 1) or group < 1 or len(shape) != 2 or min(shape) < 1:
        problems.append(f"{module}: {bits} bits, groups of {group}, axis {axis}, {list(shape)}")
        return None
    scale, zero = tensors[f"{module}.scale"], tensors[f"{module}.zero"]
    word = DType.I32 if bits == 3 else DType.U8
    groups, rest = divmod(math.prod(shape), group)
    rows, width = (group, groups) if axis == 0 else (groups, group)
    packed = TensorSpec(codes.name, word, (-(-rows // _EACH[bits]), width))
    # Some are saved as floats of the same bytes.
    fits = codes.nbytes == packed.nbytes and scale.numel == zero.numel == groups and not rest
    if not fits or scale.dtype not in TORCH or zero.dtype is not scale.dtype:
        problems.append(
            f"{module}: {_CODES} {shown(codes)}, scale {shown(scale)}, zero {shown(zero)} do not "
            f"fit {list(shape)} in {bits} bits and groups of {group}"
        )
        return None
    dense = TensorSpec(f"{module}.weight", scale.dtype, (shape[0], shape[1]))
    spread = {
        role: TensorSpec(spec.name, spec.dtype, (groups,))
        for role, spec in (("scale", scale), ("zero", zero))
    }
    settings = {"bits": bits, "group": group, "axis": axis}
    return QuantizedWeight(dense, {"codes": packed, **spread}, settings)


def _numbers(spec: TensorSpec, load: Callable[[str], bytes]) -> tuple[int, ...] | None:
    """The values of a small tensor of integers."""
    kinds = {DType.U8: "B", DType.I32: "i", DType.I64: "q"}
    if spec.dtype not in kinds or not 1 <= spec.numel <= 8:
        return None
    return struct.unpack(f"<{spec.numel}{kinds[spec.dtype]}", load(spec.name))


QUANTIZER: Final[Dequantizer] = GroupedHQQ()
