"""One quantisation scheme a file: which tensors a weight is made of, and their arithmetic."""

from __future__ import annotations

from dora_convert.core.bundle import Json
from dora_convert.core.protocols import Dequantizer, Quantizer
from dora_convert.core.tensors import Encoded
from dora_convert.errors import InputError
from dora_convert.quant._rounding import DENSE, WHOLE, decoded_block, placed, rounded_alone
from dora_convert.registry import Registry

__all__ = [
    "DENSE",
    "WHOLE",
    "decoded_block",
    "decoder",
    "detect",
    "placed",
    "quantizers",
    "rounded_alone",
    "writable",
]

quantizers: Registry[Dequantizer] = Registry("dora_convert.quant", "QUANTIZER")


def detect(config: Json) -> tuple[str, ...]:
    """The schemes that a base's config.json names; a checkpoint may hold several, or none.

    Raises InputError where it is quantised in a way that no scheme knows.
    """
    found = tuple(name for name in quantizers.names() if quantizers.get(name).detect(config))
    stated = config.get("quantization_config") or config.get("quantization")
    if stated and not found:
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        raise InputError(
            f"the base is quantised in a way that is not known: {method or 'no quant_method'}",
            where="config.json: 'quantization_config'",
            hint="Give the 16-bit original with --base, or one of these schemes: "
            f"{', '.join(quantizers.names())}.",
        )
    return found


def writable(name: str) -> Quantizer:
    """The scheme as one that can be written; raises InputError where it can only be read."""
    scheme = quantizers.get(name)
    if isinstance(scheme, Quantizer):
        return scheme
    raise InputError(
        f"{scheme.title} can be read, not written",
        hint="Its gain lies in calibration data or in a runtime of its own; "
        "w4a16 and nf4 are the 4-bit schemes that can be written without.",
    )


def decoder(source: Encoded) -> Dequantizer:
    """What turns the parts of this one tensor into rows; it may remember things about it."""
    if source.rounded:
        # Listing the schemes needs no torch.
        from dora_convert.quant._round_trip import RoundTrip  # noqa: PLC0415

        return RoundTrip(writable(source.scheme))
    return quantizers.get(source.scheme)
