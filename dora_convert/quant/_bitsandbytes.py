"""What the 4-bit schemes of bitsandbytes share: codes of 16 values, one peak for 64 elements.

Source: bitsandbytes 0.50 (`functional.QuantState`), as transformers saves it. Blocks run over the
row-major elements and may span rows; the first of two codes in a byte is the high half. With
double quantisation the peaks are 8-bit codes themselves, in blocks of 256 around their mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.extras import required
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError
from dora_convert.quant._grids import TORCH
from dora_convert.quant._linear import check_matrix
from dora_convert.quant._nearest import Nearest
from dora_convert.quant._pairs import pack_pairs
from dora_convert.quant._scheme import SinglePass, reject, stated

__all__ = ["FourBit", "document"]

_STATE = "quant_state.bitsandbytes__"
_BLOCK = 64
_NESTED_BLOCK = 256
_LARGEST_BLOCK = 4096  # of those that the library knows
_TYPES = {"bfloat16": DType.BF16, "float16": DType.F16, "float32": DType.F32}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_OFFSET_WIDTH = 24  # the longest text of a float
_SMALLEST = 1e-38
_POSITIVE_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # twelfths
_VALUES = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(value / 12 for value in (*_POSITIVE_FP4, *(0.0 - v for v in _POSITIVE_FP4))),
}


class FourBit(SinglePass):
    """`kind` is nf4 or fp4; a read weight may be nested or not, whatever is written."""

    on_host: tuple[str, ...] = ("state",)

    def __init__(self, title: str, kind: str, *, nested: bool) -> None:
        self.title = title
        self.surveys = nested
        self.surveyed = "absmax" if nested else None
        self._kind = kind
        self._nested = nested
        self._nearest = Nearest(_VALUES[kind])

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        words = stated(config, "bitsandbytes")
        return (
            words is not None
            and bool(words.get("load_in_4bit", words.get("_load_in_4bit")))
            and words.get("bnb_4bit_quant_type", "fp4") == self._kind
            and bool(words.get("bnb_4bit_use_double_quant")) is self._nested
        )

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`; shape and type are read from the JSON in `quant_state`."""
        problems: list[str] = []
        found = {}
        mark = f".{_STATE}{self._kind}"
        for stored in tensors:
            if stored.endswith(mark):
                name = stored.removesuffix(mark)
                weight = self._found(name, tensors, load(stored), problems)
                if weight is not None:
                    found[name] = weight
        for name, spec in tensors.items():
            plain = f"{name}.absmax" in tensors or f"{name}.quant_map" in tensors
            if plain and not any(f"{name}.{_STATE}{kind}" in tensors for kind in ("nf4", "fp4")):
                problems.append(f"{name} {list(spec.shape)}: quant_state is missing")
        reject(self.title, problems)
        return found

    def _found(
        self, name: str, tensors: Mapping[str, TensorSpec], text: bytes, problems: list[str]
    ) -> QuantizedWeight | None:
        state = _state(text)
        if state is None:
            problems.append(f"{name}.{_STATE}{self._kind} holds no shape, type and block size")
            return None
        rows, columns = state["shape"]
        dense = TensorSpec(name, _TYPES[state["dtype"]], (rows, columns))
        nested = f"{name}.nested_absmax" in tensors or "nested_offset" in state
        if nested and "nested_offset" not in state:
            problems.append(f"{name}.{_STATE}{self._kind} holds no nested_offset")
            return None
        parts = _parts(dense, self._kind, state["blocksize"], len(text), nested=nested)
        before = len(problems)
        for part in parts.values():
            held = tensors.get(part.name)
            if held is None:
                problems.append(f"{part.name} is missing")
            elif held.nbytes != part.nbytes:
                problems.append(
                    f"{part.name} has {held.nbytes} bytes, [out, in] = {[rows, columns]} needs "
                    f"{part.nbytes}"
                )
        if len(problems) > before:
            return None
        return QuantizedWeight(dense, parts, {"block": state["blocksize"]})

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """See `Dequantizer.windows`."""
        block = weight.settings["block"]
        first, last = start * weight.columns, stop * weight.columns
        peaks = Window(first // block, -(-last // block))
        found: dict[str, Window | None] = dict.fromkeys(weight.parts)
        found["weight"] = Window(first // 2, -(-last // 2))
        found["absmax"] = peaks
        if "nested_absmax" in weight.parts:
            found["nested_absmax"] = Window(
                peaks.start // _NESTED_BLOCK, -(-peaks.stop // _NESTED_BLOCK)
            )
        return found

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`.

        The library returns the type that the weight had, and PEFT takes the norms of that: it is
        what an adapter was trained on, and so the values are rounded to it here already.
        """
        block = weight.settings["block"]
        first, last = start * weight.columns, stop * weight.columns
        packed = parts["weight"].view(-1)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
        skip = first % 2
        values = parts["quant_map"][codes[skip : skip + last - first].long()]
        peaks = _peaks(parts, first // block)
        skip = first % block
        # Blocks do not respect rows: fill up to whole ones, and cut again.
        filled = torch.nn.functional.pad(values, (skip, -(skip + last - first) % block))
        dense = filled.view(-1, block).mul_(peaks.unsqueeze(1)).view(-1)
        dense = dense[skip : skip + last - first].view(stop - start, weight.columns)
        return dense.to(TORCH[weight.dense.dtype]).float()

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`.

        The mean of the peaks stands in a JSON text, whose length is not known before the data: with
        double quantisation the text is filled up with spaces, which every reader skips.
        """
        check_matrix(dense, self.title)
        if dense.dtype not in _NAMES:
            raise InputError(
                f"{self.title} is made of 16- or 32-bit floats",
                where=f"{dense.name} {list(dense.shape)} is {dense.dtype.label}",
                hint="Store the base in bfloat16, as it was loaded for training.",
            )
        width = len(self._text(dense, 0.0 if self._nested else None))
        parts = _parts(dense, self._kind, _BLOCK, width, nested=self._nested)
        return QuantizedWeight(dense, parts, {"block": _BLOCK})

    def row_multiple(self, weight: QuantizedWeight) -> int:
        """See `Quantizer.row_multiple`."""
        return _BLOCK // math.gcd(_BLOCK, weight.columns)

    def survey(self, rows: Tensor) -> Tensor:
        """The peak of every block of 64."""
        found = _blocks(rows).abs().amax(dim=1)
        if rows.numel() % _BLOCK:
            found[-1].clamp_(min=_SMALLEST)  # as bitsandbytes does, for a cut block alone
        return found

    def gather(self, surveys: Sequence[Tensor]) -> Tensor:
        """All peaks, a 64th of the weight."""
        return surveys[0] if len(surveys) == 1 else torch.cat(list(surveys))

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        blocks, peaks = _blocks(rows), self.survey(rows)
        # As bitsandbytes does: times the reciprocal, but for a cut block.
        scaled = blocks * (1.0 / peaks.clamp(min=_SMALLEST)).unsqueeze(1)
        if rows.numel() % _BLOCK:
            scaled[-1] = blocks[-1] / peaks[-1]
        codes = self._nearest.indices(scaled.clamp_(-1, 1))
        packed = pack_pairs(codes, high_first=True)[: -(-rows.numel() // 2)]
        parts = {"weight": packed.view(-1, 1)}
        return parts if self._nested else parts | {"absmax": peaks}

    def constants(
        self, weight: QuantizedWeight, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The table of values, the JSON text, and with double quantisation all about the peaks."""
        parts = {"quant_map": torch.tensor(_VALUES[self._kind])}
        offset = None
        if self._nested:
            assert statistic is not None
            mean = statistic.mean()
            made = [
                _library().quantize_blockwise(part - mean, blocksize=_NESTED_BLOCK)
                for part in torch.split(statistic, _NESTED_BLOCK * _NESTED_BLOCK)
            ]
            parts |= {
                "absmax": torch.cat([codes for codes, _ in made]),
                "nested_absmax": torch.cat([nested.absmax for _, nested in made]),
                "nested_quant_map": made[0][1].code,
            }
            offset = float(mean)
        text = self._text(weight.dense, offset)
        parts["state"] = torch.tensor(list(text), dtype=torch.uint8)
        return parts

    def _text(self, dense: TensorSpec, offset: float | None) -> bytes:
        """The JSON text, in the library's own order."""
        words: dict[str, object] = {"quant_type": self._kind, "blocksize": _BLOCK}
        words |= {"dtype": _NAMES[dense.dtype], "shape": list(dense.shape)}
        if offset is None:
            return json.dumps(words).encode()
        words |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32"}
        width = len(json.dumps(words | {"nested_offset": 0.0})) - len("0.0") + _OFFSET_WIDTH
        return json.dumps(words | {"nested_offset": offset}).ljust(width).encode()

    def config(self, kept_dense: Sequence[str]) -> Json:
        """See `Quantizer.config`."""
        return document(
            kept_dense,
            load_in_4bit=True,
            bnb_4bit_quant_type=self._kind,
            bnb_4bit_use_double_quant=self._nested,
            bnb_4bit_compute_dtype="bfloat16",
        )


def document(kept_dense: Sequence[str], *, load_in_4bit: bool, **words: object) -> Json:
    """The `quantization_config` that transformers writes for bitsandbytes."""
    bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": not load_in_4bit}
    defaults = {
        "quant_method": "bitsandbytes",
        **{f"_{key}": value for key, value in bits.items()},
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": sorted(kept_dense) or None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        **bits,
    }
    return {"quantization_config": defaults | words}


def _blocks(rows: Tensor) -> Tensor:
    """Rows as float32 `[blocks, 64]`, the last filled up with zeros."""
    flat = rows.reshape(-1).float()
    missing = -len(flat) % _BLOCK
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, _BLOCK)


def _peaks(parts: Mapping[str, Tensor], first: int) -> Tensor:
    """The peaks of the window, which begins at block `first` of the weight."""
    peaks = parts["absmax"]
    if "nested_absmax" not in parts:
        return peaks
    offset: float = json.loads(bytes(parts["state"].tolist()))["nested_offset"]
    blocks = torch.arange(first, first + len(peaks), device=peaks.device)
    index = blocks // _NESTED_BLOCK - first // _NESTED_BLOCK
    return parts["nested_quant_map"][peaks.long()] * parts["nested_absmax"][index] + offset


def _parts(
    dense: TensorSpec, kind: str, block: int, text: int, *, nested: bool
) -> dict[str, TensorSpec]:
    name, blocks = dense.name, -(-dense.numel // block)
    sizes = {
        "absmax": (DType.U8 if nested else DType.F32, blocks),
        "quant_map": (DType.F32, 16),
    }
    if nested:
        sizes["nested_absmax"] = (DType.F32, -(-blocks // _NESTED_BLOCK))
        sizes["nested_quant_map"] = (DType.F32, 256)
    return {
        "weight": TensorSpec(name, DType.U8, (-(-dense.numel // 2), 1)),
        **{role: TensorSpec(f"{name}.{role}", t, (n,)) for role, (t, n) in sizes.items()},
        "state": TensorSpec(f"{name}.{_STATE}{kind}", DType.U8, (text,)),
    }


def _state(text: bytes) -> dict[str, Any] | None:
    """The JSON of `quant_state`, if it holds what is needed."""
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(state, dict) or str(state.get("dtype")) not in _TYPES:
        return None
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2:
        return None
    if any(type(n) is not int or n < 1 for n in (*shape, block)):
        return None
    if state.get("nested_blocksize", _NESTED_BLOCK) != _NESTED_BLOCK:
        return None
    good = state["blocksize"] <= _LARGEST_BLOCK
    return state if good and isinstance(state.get("nested_offset", 0.0), float) else None


def _library() -> Any:
    # The whole package first: another thread may be half-way through it, with `functional` there
    # already and the operators for this processor not yet.
    required("bitsandbytes", "bnb", "double quantisation")
    return required("bitsandbytes.functional", "bnb", "double quantisation")
