"""Element types as torch has them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from dora_convert.core.tensors import DType

__all__ = ["TORCH", "from_torch"]

# Not F4 and F6: torch has no 6-bit type, and an element of its 4-bit type is a pair.
TORCH: Mapping[DType, torch.dtype] = MappingProxyType(
    {
        DType.BOOL: torch.bool,
        DType.U8: torch.uint8,
        DType.I8: torch.int8,
        DType.F8_E5M2: torch.float8_e5m2,
        DType.F8_E4M3: torch.float8_e4m3fn,
        DType.F8_E8M0: torch.float8_e8m0fnu,
        DType.F8_E4M3FNUZ: torch.float8_e4m3fnuz,
        DType.F8_E5M2FNUZ: torch.float8_e5m2fnuz,
        DType.I16: torch.int16,
        DType.U16: torch.uint16,
        DType.F16: torch.float16,
        DType.BF16: torch.bfloat16,
        DType.I32: torch.int32,
        DType.U32: torch.uint32,
        DType.F32: torch.float32,
        DType.C64: torch.complex64,
        DType.F64: torch.float64,
        DType.I64: torch.int64,
        DType.U64: torch.uint64,
    }
)

_FROM_TORCH = {native: dtype for dtype, native in TORCH.items()}


def from_torch(dtype: torch.dtype) -> DType:
    """Invert `TORCH`; KeyError for a type that safetensors does not have."""
    return _FROM_TORCH[dtype]
