"""GPTQ: integers packed along the in axis, stored as `[in, out]`, in groups with a zero point.

Source: gptqmodel `nn_modules/qlinear`; config `quant_method: gptq`. The first form of a checkpoint
(`checkpoint_format: gptq`) stores zero points less one, the second (`gptq_v2`) as they are. With
act-order the groups of the in axis are those of `g_idx`; no row is moved. Read only: GPTQ's gain
is its calibration, and without it w4a16 holds the same numbers in a better container.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError
from dora_convert.quant._grids import TORCH
from dora_convert.quant._packed import unpack_words
from dora_convert.quant._scheme import reject, shown, stated

__all__ = ["QUANTIZER", "GroupedGPTQ"]

_BITS = (2, 4, 8)


class GroupedGPTQ:
    """2, 4 and 8 bits; 3 bits, which cross words, are refused."""

    title = "GPTQ"
    on_host: tuple[str, ...] = ("groups",)

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        return stated(config, "gptq") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`."""
        words = stated(config, "gptq") or {}
        stated_bits, form = words.get("bits"), words.get("checkpoint_format", "gptq")
        bits = next((n for n in _BITS if n == stated_bits), 0)
        problems: list[str] = []
        if not bits:
            problems.append(f"config.json: {stated_bits!r:.40} bits are not known (2, 4 or 8)")
        if form not in ("gptq", "gptq_v2"):
            problems.append(f"config.json: 'checkpoint_format' {form!r} is not known")
        reject(self.title, problems)
        settings = {"bits": bits, "less": int(form == "gptq")}
        found = {}
        for stored in tensors:
            module, _, leaf = stored.rpartition(".")
            if leaf == "qweight":
                weight = _weight(module, tensors, settings, problems)
                if weight is not None:
                    found[weight.dense.name] = weight
        reject(self.title, problems)
        return found

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """See `Dequantizer.windows`; rows of the weight are columns of the file."""
        each = 32 // weight.settings["bits"]
        rows = Window(start, stop, axis=1)
        return {
            "codes": rows,
            "scales": rows,
            "zeros": Window(start // each, -(-stop // each), axis=1),
            "groups": None,
        }

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        bits = weight.settings["bits"]
        codes = unpack_words(parts["codes"].t().contiguous(), bits)  # [n, in]
        words = parts["zeros"].contiguous()
        if weight.settings["less"]:
            # It was taken from whole words: what a zero point of 0 borrowed is given back.
            words = words + sum(1 << shift for shift in range(0, 32, bits))
        skip = start % (32 // bits)
        zeros = unpack_words(words, bits)[:, skip : skip + stop - start]  # [groups, n]
        groups = parts["groups"].long()
        if groups.min() < 0 or groups.max() >= len(zeros):
            raise InputError(
                f"g_idx names a group that is not there: there are {len(zeros)}",
                where=weight.parts["groups"].name,
            )
        groups = parts["groups"].to(codes.device, non_blocking=True).long()
        scales = parts["scales"].float().t()[:, groups]
        return (codes - zeros.t()[:, groups]).float().mul_(scales)


def _weight(
    module: str,
    tensors: Mapping[str, TensorSpec],
    settings: Mapping[str, int],
    problems: list[str],
) -> QuantizedWeight | None:
    each = 32 // settings["bits"]
    names = {"codes": "qweight", "zeros": "qzeros", "scales": "scales", "groups": "g_idx"}
    held = {role: tensors.get(f"{module}.{leaf}") for role, leaf in names.items()}
    parts = {role: spec for role, spec in held.items() if spec is not None}
    missing = [names[role] for role in names if role not in parts]
    if missing:
        problems.append(f"{module}: {', '.join(missing)} missing")
        return None
    codes, scales = parts["codes"], parts["scales"]
    if len(codes.shape) != 2 or len(scales.shape) != 2:
        problems.append(f"{module}: qweight {shown(codes)}, scales {shown(scales)}")
        return None
    columns, rows, groups = codes.shape[0] * each, codes.shape[1], scales.shape[0]
    expected = {"zeros": (groups, -(-rows // each)), "scales": (groups, rows), "groups": (columns,)}
    wrong = [
        f"{module}.{names[role]} {shown(parts[role])} does not fit [out, in] = {[rows, columns]}"
        for role, shape in expected.items()
        if parts[role].shape != shape
    ]
    if any(parts[role].dtype is not DType.I32 for role in ("codes", "zeros", "groups")):
        wrong.append(f"{module}: qweight, qzeros and g_idx must be I32")
    if scales.dtype not in TORCH:
        wrong.append(f"{module}: scales must be floats, not {scales.dtype.label}")
    problems += wrong
    if wrong:
        return None
    dense = TensorSpec(f"{module}.weight", scales.dtype, (rows, columns))
    return QuantizedWeight(dense, parts, settings)


QUANTIZER: Final[Dequantizer] = GroupedGPTQ()
