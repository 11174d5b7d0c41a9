"""MLX affine: 4 bits in groups of 64 along the row, each with a scale and a bias.

Source: `mlx.core.quantize`, mode affine; config `quantization` as mlx-lm writes it. The end of the
range that is farther from zero is held exactly; embeddings and the head are quantised too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.quant._grids import TORCH
from dora_convert.quant._linear import check_matrix, is_matrix_of_a_layer, module_of
from dora_convert.quant._packed import pack_words
from dora_convert.quant._scheme import SinglePass, reject, shown

__all__ = ["QUANTIZER", "AffineMLX"]

_BITS, _GROUP = 4, 64
_MOST = 2**_BITS - 1
_EPSILON = 1e-7  # the least scale


class AffineMLX(SinglePass):
    """Reads 2, 3, 4, 5, 6 and 8 bits in any group; writes 4 in groups of 64."""

    title = "MLX affine, 4 bits, groups of 64"
    folds = ("scales", "biases")
    folds_best = True

    def detect(self, config: Json) -> bool:
        """Whether there is a `quantization` of mode affine and no other method."""
        words = _words(config)
        return words is not None and words.get("mode", "affine") == "affine"

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`; bits and group may be given for each module."""
        problems: list[str] = []
        found = {}
        words = _words(config) or {}
        for name, spec in tensors.items():
            if spec.dtype is not DType.U32 or not name.endswith(".weight"):
                continue
            module = module_of(name)
            own = words.get(module)
            bits, group = (
                (own if isinstance(own, dict) else words).get(key) for key in ("bits", "group_size")
            )
            held = [tensors.get(f"{module}.{part}") for part in ("scales", "biases")]
            scales, biases = held
            if scales is None or biases is None:
                missing = "scales" if scales is None else "biases"
                problems.append(f"{module}.{missing} is missing")
            elif type(bits) is not int or type(group) is not int or group < 1 or not 2 <= bits <= 8:
                problems.append(f"{module}: the config gives bits {bits!r}, group {group!r}")
            elif (
                scales.shape != biases.shape
                or scales.dtype not in TORCH
                or len(spec.shape) != 2
                or (spec.shape[0], spec.shape[1] * 32)
                != (scales.shape[0], scales.shape[-1] * group * bits)
            ):
                problems.append(
                    f"{name} {shown(spec)}: scales {shown(scales)}, biases {shown(biases)} do not "
                    f"fit {bits} bits in groups of {group}"
                )
            else:
                shape = (spec.shape[0], scales.shape[1] * group)
                parts = {"weight": spec, "scales": scales, "biases": biases}
                settings = {"bits": bits, "group": group}
                found[name] = QuantizedWeight(
                    TensorSpec(name, scales.dtype, shape), parts, settings
                )
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`."""
        return dict.fromkeys(weight.parts, Window(start, stop))

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        bits, group = weight.settings["bits"], weight.settings["group"]
        codes = _unpack(parts["weight"], bits).float().view(stop - start, -1, group)
        codes.mul_(parts["scales"].float().unsqueeze(2)).add_(parts["biases"].float().unsqueeze(2))
        return codes.view(stop - start, weight.columns)

    def takes(self, dense: TensorSpec) -> bool:
        """Every matrix of a layer, embeddings and the head among them."""
        return is_matrix_of_a_layer(dense)

    def layout(self, dense: TensorSpec) -> QuantizedWeight:
        """See `Quantizer.layout`."""
        check_matrix(dense, self.title, columns=_GROUP)
        rows, columns = dense.shape
        module = module_of(dense.name)
        grid = (rows, columns // _GROUP)
        parts = {
            "weight": TensorSpec(dense.name, DType.U32, (rows, columns * _BITS // 32)),
            "scales": TensorSpec(f"{module}.scales", dense.dtype, grid),
            "biases": TensorSpec(f"{module}.biases", dense.dtype, grid),
        }
        return QuantizedWeight(dense, parts, {"bits": _BITS, "group": _GROUP})

    def quantize(
        self, weight: QuantizedWeight, rows: Tensor, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.quantize`; mlx computes in float32 whatever the type."""
        low, high = torch.aminmax(rows.float().view(rows.shape[0], -1, _GROUP), dim=2)
        down = low.abs() > high.abs()
        scale = ((high - low) / _MOST).clamp_(min=_EPSILON)
        scale = torch.where(down, scale, -scale)
        edge = torch.where(down, low, high)
        steps = torch.round(edge / scale)
        scale = torch.where(steps == 0, scale, edge / steps)
        bias = torch.where(steps == 0, 0.0, edge)
        return self.quantize_under(weight, rows, {"scales": scale, "biases": bias})

    def quantize_under(
        self, weight: QuantizedWeight, rows: Tensor, scales: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """See `Folding.quantize_under`; codes are made before the scales are rounded."""
        scale, bias = scales["scales"], scales["biases"]
        scale = torch.where(scale == 0, _EPSILON, scale)
        grouped = rows.float().view(rows.shape[0], -1, _GROUP)
        codes = ((grouped - bias.unsqueeze(2)) / scale.unsqueeze(2)).round_().clamp_(0, _MOST)
        words = pack_words(codes.int().view(rows.shape), _BITS).view(torch.uint32)
        kind = TORCH[weight.parts["scales"].dtype]
        return {"weight": words, "scales": scale.to(kind), "biases": bias.to(kind)}

    def config(self, kept_dense: Sequence[str]) -> Json:
        """As mlx-lm writes it, under both names; `false` is its word for a dense module."""
        words = {"group_size": _GROUP, "bits": _BITS, "mode": "affine"}
        words |= dict.fromkeys(sorted(kept_dense), False)
        return {"quantization": words, "quantization_config": words}


def _words(config: Json) -> Mapping[str, Any] | None:
    words = config.get("quantization") or config.get("quantization_config")
    if not isinstance(words, dict) or "quant_method" in words:
        return None
    return words if "bits" in words and "group_size" in words else None


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of a little-endian stream of bits along the row, int32 `[n, words * 32 / bits]`."""
    stream = words.contiguous().view(torch.uint8).view(words.shape[0], -1, bits).int()
    # Eight codes take `bits` bytes, and no code reaches over more than two of them.
    codes = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = stream[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (stream[:, :, byte + 1] << (8 - shift))
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, dim=2).view(words.shape[0], -1)


QUANTIZER: Final[Dequantizer] = AffineMLX()
