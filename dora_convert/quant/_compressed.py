"""What the schemes of compressed-tensors share: scales per group of a row, config, kept layers.

Source: compressed-tensors 0.20 (`quantization/utils/helpers.py`, `lifecycle/forward.py`), for
weights without calibration: the range is that of the weight itself, the divisor half the range of
codes (127.5, 7.5, 448), and every step is rounded to the type that it is computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._grids import TORCH, expand, tile_window
from dora_convert.quant._linear import check_matrix
from dora_convert.quant._scheme import SinglePass, reject, shown, stated

__all__ = ["Codes", "PlainCodes", "document", "group_codes", "group_scales", "groups"]

_METHOD = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class Codes:
    """The range of stored values, and the type that holds one."""

    low: float
    high: float
    native: torch.dtype

    @property
    def half(self) -> float:
        """What the largest weight of a group is divided by to get the scale."""
        return (self.high - self.low) / 2


def groups(config: Json) -> list[tuple[str, dict[str, Any]]]:
    """`(format, weights)` of every group in the config."""
    words = stated(config, _METHOD) or stated(config, _METHOD, "compression_config")
    found = (words or {}).get("config_groups")
    if words is None or not isinstance(found, dict):
        return []
    return [
        (str(group.get("format") or words.get("format")), group["weights"])
        for group in found.values()
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]


def document(
    layout: str,
    weights: Mapping[str, Any],
    kept_dense: Sequence[str],
    activations: Mapping[str, Any] | None = None,
) -> Json:
    """The `quantization_config` of a checkpoint with one group of linear layers."""
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": None
        if activations is None
        else {"symmetric": True, "strategy": "token", "dynamic": True, **activations},
        "output_activations": None,
        "format": layout,
    }
    words = {
        "config_groups": {"group_0": group},
        "quant_method": _METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": sorted(kept_dense),
    }
    return {"quantization_config": words}


def group_scales(rows: Tensor, codes: Codes, width: int) -> Tensor:
    """Scales `[n, in / width]` of `rows`, in their element type."""
    grouped = rows.view(rows.shape[0], -1, width)
    # Half the range is a number of the same type for the original: 127.5 and 7.5 fit bfloat16.
    return grouped.abs().amax(dim=2) / codes.half


def group_codes(
    rows: Tensor, scale: Tensor, codes: Codes, scale_type: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes `[n, in]` of `rows` under `scale`, and the scales in their stored type."""
    scale = scale.to(scale_type)
    scale = torch.where(scale == 0, torch.finfo(scale_type).eps, scale)
    grouped = rows.view(*scale.shape, -1)
    scaled = (grouped / scale.to(rows.dtype).unsqueeze(2)).clamp_(codes.low, codes.high)
    if not codes.native.is_floating_point:
        scaled.round_()
    return scaled.to(codes.native).view(rows.shape), scale


class PlainCodes(SinglePass):
    """One element a weight: `weight` and `weight_scale`; written with one scale a row."""

    folds = ("scale",)
    folds_best = False

    def __init__(
        self, title: str, layout: str, dtype: DType, codes: Codes, words: Mapping[str, Any]
    ) -> None:
        self.title = title
        self._layout = layout
        self._dtype = dtype
        self._codes = codes
        self._words = words

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`."""
        kind = self._words["type"]
        return any(
            layout in (self._layout, "naive-quantized") and w.get("type") == kind
            for layout, w in groups(config)
        )

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`."""
        problems: list[str] = []
        found = {}
        for name, spec in tensors.items():
            if spec.dtype is not self._dtype or not name.endswith(".weight"):
                continue
            scale, zero = tensors.get(f"{name}_scale"), tensors.get(f"{name}_zero_point")
            if scale is None or len(spec.shape) != 2:
                missing = "weight_scale is missing" if scale is None else "is no matrix"
                problems.append(f"{name} {shown(spec)}: {missing}")
                continue
            tile = _tile(config, spec.shape, scale)
            if tile is None or scale.dtype not in TORCH:
                problems.append(f"{name} {shown(spec)}: weight_scale {shown(scale)} does not fit")
                continue
            grid = (-(-spec.shape[0] // tile[0]), -(-spec.shape[1] // tile[1]))
            parts = {"weight": spec, "scale": TensorSpec(scale.name, scale.dtype, grid)}
            if zero is not None:
                if zero.numel != scale.numel:
                    problems.append(f"{name}: weight_zero_point {shown(zero)} does not fit")
                    continue
                parts["zero"] = TensorSpec(zero.name, zero.dtype, grid)
            dense = TensorSpec(name, scale.dtype, spec.shape)
            found[name] = QuantizedWeight(dense, parts, {"height": tile[0], "width": tile[1]})
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`."""
        tiles = tile_window(start, stop, weight.settings["height"])
        return {role: Window(start, stop) if role == "weight" else tiles for role in weight.parts}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        tile = (weight.settings["height"], weight.settings["width"])
        codes = parts["weight"].float()
        if "zero" in parts:
            codes -= expand(parts["zero"].float(), start, stop, *tile, weight.columns)
        return codes.mul_(expand(parts["scale"].float(), start, stop, *tile, weight.columns))

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`."""
        check_matrix(dense, self.title)
        rows, columns = dense.shape
        parts = {
            "weight": TensorSpec(dense.name, self._dtype, dense.shape),
            "scale": TensorSpec(f"{dense.name}_scale", dense.dtype, (rows, 1)),
        }
        return QuantizedWeight(dense, parts, {"height": 1, "width": columns})

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`."""
        scale = group_scales(rows, self._codes, weight.columns)
        return self.quantize_under(weight, rows, {"scale": scale})

    def quantize_under(
        self, weight: QuantizedWeight, rows: Tensor, scales: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """See `Folding.quantize_under`."""
        scale_type = TORCH[weight.parts["scale"].dtype]
        codes, scale = group_codes(rows, scales["scale"], self._codes, scale_type)
        return {"weight": codes, "scale": scale}

    def config(self, kept_dense: Sequence[str]) -> Json:
        """See `Quantizer.config`."""
        weights = {**self._words, "group_size": None, "strategy": "channel"}
        activations = {**self._words, "group_size": None}
        return document(self._layout, weights, kept_dense, activations)


def _tile(config: Json, shape: tuple[int, ...], scale: TensorSpec) -> tuple[int, int] | None:
    """Rows and columns under one scale."""
    rows, columns = shape
    if scale.numel == 1:
        return rows, columns
    for _, weights in groups(config):
        block = weights.get("block_structure")
        if weights.get("strategy") == "block" and isinstance(block, list) and len(block) == 2:
            height, width = block
            if not all(type(n) is int and n > 0 for n in block):
                return None
            if scale.shape == (-(-rows // height), -(-columns // width)):
                return height, width
    if len(scale.shape) == 2 and scale.shape[0] == rows and columns % scale.shape[1] == 0:
        return 1, columns // scale.shape[1]
    return None
