"""FP8 without a config, of image and video models: bare, or with scales beside it.

Source: ComfyUI (`model_detection.py`, `ops.py`): `X.scale_weight` multiplies `X.weight`, a tensor
`scaled_fp8` marks the file, and `X.scale_input` is for activations; musubi-tuner
(`fp8_optimization_utils.py`): scales of one number, of one a row, or of blocks along each row. Bare
values are what they are. Read only: the runtimes make it of 16 bits when they load a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._scheme import dense_type, reject, shown, stated

__all__ = ["QUANTIZER", "ScaledFP8"]

_CODES = (DType.F8_E4M3, DType.F8_E5M2)
_SCALES = (DType.F32, DType.BF16, DType.F16)
_MARKER = "scaled_fp8"
_KNOWN = ("scale_weight", "scale_input")
_OTHER = re.compile(r"scale|quant")


class ScaledFP8:
    """Every tensor of FP8 is one of it, a bias too."""

    title = "FP8 of image models"
    on_host: tuple[str, ...] = ()

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`; said by what reads the file, for no config does."""
        return stated(config, "scaled_fp8") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`."""
        problems: list[str] = []
        found: dict[str, QuantizedWeight] = {}
        markers = {name for name in tensors if name.rpartition(".")[2] == _MARKER}
        strange = _strange(tensors)
        coded = {n: s for n, s in tensors.items() if s.dtype in _CODES and s.shape and s.numel}
        for name, spec in coded.items():
            module = name.rpartition(".")[0]
            if name in markers:
                continue
            if module in strange:
                problems.append(f"{name}: what {strange[module]} says of it is not known")
                continue
            scale = tensors.get(f"{module}.scale_weight") if name.endswith(".weight") else None
            weight = _weight(spec, scale, dense_type(config))
            if weight is None:
                assert scale is not None
                problems.append(f"{name}: {shown(spec)} with a scale {shown(scale)} is not known")
                continue
            found[name] = weight
        if found:  # what marks the file goes with the codes that it speaks of
            name, weight = next(iter(found.items()))
            extra = {marker: tensors[marker] for marker in sorted(markers)}
            found[name] = replace(weight, parts={**weight.parts, **extra})
        reject(self.title, problems)
        return found

    def windows(
        self, weight: QuantizedWeight, start: int, stop: int
    ) -> Mapping[str, Window | None]:
        """See `Dequantizer.windows`."""
        rows = Window(start, stop)
        scale = weight.parts.get("scale")
        if scale is None:
            return {"codes": rows}
        return {"codes": rows, "scale": None if scale.shape[0] == 1 else rows}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        values = parts["codes"].float()
        if "scale" not in parts:
            return values
        scale = parts["scale"].float()
        return values.mul_(scale.repeat_interleave(weight.columns // scale.shape[1], dim=1))


def _strange(tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Modules with codes that have other scales beside them, and what these are called."""
    coded = {name.rpartition(".")[0] for name, spec in tensors.items() if spec.dtype in _CODES}
    found = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if module and module in coded and leaf not in _KNOWN and _OTHER.search(leaf):
            found[module] = leaf
    return found


def _weight(spec: TensorSpec, scale: TensorSpec | None, dtype: DType) -> QuantizedWeight | None:
    """None for scales that do not fit."""
    rows, columns = spec.shape[0], spec.numel // max(spec.shape[0], 1)
    matrix = TensorSpec(spec.name, dtype, (rows, columns))
    parts = {"codes": TensorSpec(spec.name, spec.dtype, (rows, columns))}
    shape = spec.shape if len(spec.shape) != 2 else ()
    if scale is None:
        return QuantizedWeight(matrix, parts, shape=shape)
    grid = _grid(scale, rows, columns)
    if grid is None:
        return None
    parts["scale"] = TensorSpec(scale.name, scale.dtype, grid)
    return QuantizedWeight(matrix, parts, shape=shape)


def _grid(scale: TensorSpec, rows: int, columns: int) -> tuple[int, int] | None:
    """Scales as a matrix of one row or of all, with an entry for so many equal parts of a row."""
    if scale.dtype not in _SCALES:
        return None
    if scale.numel == 1:
        return (1, 1)
    blocks = scale.numel // max(rows, 1)
    fits = scale.shape[0] == rows and blocks * rows == scale.numel and blocks > 0
    return (rows, blocks) if fits and not columns % blocks else None


QUANTIZER: Final[Dequantizer] = ScaledFP8()
