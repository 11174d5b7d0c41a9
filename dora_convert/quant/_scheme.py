"""What most schemes have in common: nothing is asked of a block but its own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.quantized import QuantizedWeight
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError
from dora_convert.quant._linear import is_linear

__all__ = ["SinglePass", "dense_type", "reject", "shown", "stated"]

_TYPES = {"bfloat16": DType.BF16, "float16": DType.F16, "float32": DType.F32}


class SinglePass:
    """The answers of a scheme without statistics, as far as they are the same for all."""

    on_host: tuple[str, ...] = ()
    surveys = False
    surveyed: str | None = None
    two_pass = False
    returns: DType | None = None

    def takes(self, dense: TensorSpec) -> bool:
        """See `Quantizer.takes`."""
        return is_linear(dense)

    def row_multiple(self, weight: QuantizedWeight) -> int:
        """See `Quantizer.row_multiple`."""
        return 1

    def fused(self, name: str) -> str | None:
        """See `Quantizer.fused`."""
        return None

    def survey(self, rows: Tensor) -> Tensor:
        """Not asked for where `surveys` is false."""
        raise NotImplementedError

    def gather(self, surveys: Sequence[Tensor]) -> Tensor:
        """Not asked for where `surveys` is false."""
        raise NotImplementedError

    def constants(
        self, weight: QuantizedWeight, statistic: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See `Quantizer.constants`."""
        return {}


def stated(config: Json, method: str, key: str = "quantization_config") -> dict[str, Any] | None:
    """The config's word on quantisation, if it is of that method."""
    found = config.get(key)
    return found if isinstance(found, dict) and found.get("quant_method") == method else None


def dense_type(config: Json) -> DType:
    """The type that the model computes in; bfloat16 where the config does not say."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            name = str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")
            if name in _TYPES:
                return _TYPES[name]
    return DType.BF16


def shown(spec: TensorSpec) -> str:
    """Type and shape, for a message."""
    return f"{spec.dtype.label} {list(spec.shape)}"


def reject(title: str, problems: Sequence[str]) -> None:
    """Raise InputError if there are problems."""
    if problems:
        raise InputError(f"the base's weights in {title} cannot be read", problems=problems)
