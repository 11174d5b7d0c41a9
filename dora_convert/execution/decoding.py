"""A quantised checkpoint seen as the dense one that it stands for, and the reader of both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dora_convert import quant
from dora_convert.core.bundle import Checkpoint, Json
from dora_convert.core.protocols import Dequantizer, Quantizer
from dora_convert.core.quantized import DECLARED_IN, QuantizedWeight
from dora_convert.core.tensors import DType, Encoded, Slice, TensorRef, TensorSpec
from dora_convert.errors import InputError
from dora_convert.storage.reader import Reader

__all__ = ["as_trained", "decoded", "open_reader"]

# Files that tools read instead of config.json.
_RECENT = 16  # weights whose numbers are kept
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def open_reader() -> Reader:
    """A reader that decodes what lies in any scheme of `quant`."""
    return Reader(_Decoders())


class _Decoders:
    """Of a weight that is rounded as it is read, all units share what is known of the whole."""

    def __init__(self) -> None:
        self._recent: dict[str, Dequantizer] = {}
        self._lock = threading.Lock()

    def __call__(self, source: Encoded) -> Dequantizer:
        if not source.rounded:
            return quant.decoder(source)
        name = source.weight.dense.name
        with self._lock:
            if name not in self._recent:
                self._recent[name] = quant.decoder(source)
            while len(self._recent) > _RECENT:
                self._recent.pop(next(iter(self._recent)))
            return self._recent[name]


def as_trained(
    checkpoint: Checkpoint, scheme: str, *, transposed: Callable[[str], bool]
) -> Checkpoint:
    """The dense checkpoint with each weight that the scheme takes as it comes back from it.

    `transposed` tells the paths of modules whose weight is stored `[in, out]`. Raises InputError
    for a base that is quantised itself, and for a scheme that no adapter is trained on.
    """
    quantizer = quant.writable(scheme)
    if checkpoint.schemes:
        raise InputError(
            f"the base is quantised itself ({', '.join(checkpoint.schemes)}), so that it is known "
            "what the adapter was trained on",
            where=str(checkpoint.root),
            hint="Leave --trained-on out, or give the 16-bit original with --base.",
        )
    if quantizer.two_pass:
        raise InputError(
            f"{quantizer.title} shares scales between layers and is for serving, not for training"
        )
    tensors = {
        name: _rounded(ref, scheme, quantizer, flip=transposed(name.removesuffix(".weight")))
        if len(ref.spec.shape) == 2 and quantizer.takes(ref.spec)
        else ref
        for name, ref in checkpoint.tensors.items()
    }
    if not any(isinstance(ref.source, Encoded) for ref in tensors.values()):
        raise InputError(
            f"the base has no weight that {quantizer.title} would quantise",
            where=str(checkpoint.root),
        )
    return replace(checkpoint, tensors=tensors)


def _rounded(ref: TensorRef, scheme: str, quantizer: Quantizer, *, flip: bool) -> TensorRef:
    """Quantised `[out, in]` always, as transformers does with layers that are stored otherwise."""
    dense = ref.permuted(1, 0) if flip else ref
    quantizer.layout(dense.spec)  # refuses what it cannot hold
    weight = QuantizedWeight(dense.spec, {quant.DENSE: dense.spec})
    source = Encoded(scheme, weight, {quant.DENSE: dense, quant.WHOLE: dense}, rounded=True)
    rounded = TensorRef(dense.spec, source, dense.spec)
    return rounded.permuted(1, 0) if flip else rounded


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with a dense matrix for each that is quantised, to be decoded as read.

    Its config no longer says that it is. Raises InputError for a scheme that is not known, and for
    parts that are missing or do not fit.
    """
    schemes = quant.detect(checkpoint.config)
    if not schemes:
        return checkpoint
    specs = {name: ref.spec for name, ref in checkpoint.tensors.items()}
    reader = Reader()

    def load(name: str) -> bytes:
        data = reader.load(checkpoint.tensors[name]).contiguous()
        return data.view(-1).view(torch.uint8).numpy().tobytes()

    weights: dict[str, tuple[str, QuantizedWeight]] = {}
    for scheme in schemes:
        found = quant.quantizers.get(scheme).find(checkpoint.config, specs, load)
        weights |= {name: (scheme, weight) for name, weight in found.items()}
    if not weights:
        raise InputError(
            f"the base's config says that it is quantised ({', '.join(schemes)}), "
            "but none of its tensors is",
            where=str(checkpoint.root / "config.json"),
            hint="If the weights are dense, delete that entry from the config.",
        )
    beside = _beside({name: weight for name, (_, weight) in weights.items()}, checkpoint)
    dense = {
        name: _reference(scheme, weight, beside.get(name, []), checkpoint)
        for name, (scheme, weight) in weights.items()
    }
    kept = [name for name in checkpoint.files if name not in _FILES]
    return replace(
        _replaced(checkpoint, dense),
        config=_without(checkpoint.config),
        files=tuple(kept),
        schemes=schemes,
    )


def _reference(
    scheme: str, weight: QuantizedWeight, rest: Sequence[TensorRef], checkpoint: Checkpoint
) -> TensorRef:
    parts = {
        role: _seen_as(checkpoint.tensors[spec.name], spec) for role, spec in weight.parts.items()
    }
    ref = TensorRef(weight.dense, Encoded(scheme, weight, parts, tuple(rest)), weight.dense)
    return ref.reshaped(*weight.shape) if weight.shape else ref


def _beside(
    weights: Mapping[str, QuantizedWeight], checkpoint: Checkpoint
) -> dict[str, list[TensorRef]]:
    """What else the modules of quantised weights have, but for their biases."""
    modules = {name.removesuffix(".weight"): name for name in weights}
    parts = {spec.name for weight in weights.values() for spec in weight.parts.values()}
    found: dict[str, list[TensorRef]] = {}
    for name, ref in checkpoint.tensors.items():
        pieces = name.split(".")
        owners = (".".join(pieces[:n]) for n in range(len(pieces) - 1, 0, -1))
        owner = next((path for path in owners if path in modules), None)
        if owner is not None and name not in parts and name != f"{owner}.bias":
            found.setdefault(modules[owner], []).append(ref)
    return found


def _seen_as(ref: TensorRef, spec: TensorSpec) -> TensorRef:
    """The same bytes under the type and the shape that the scheme gives them."""
    if not isinstance(ref.source, Slice):
        raise InputError(
            f"{ref.stored.name} is quantised and lies in a pickle, which is not supported",
            where=str(ref.source),
            hint="Save the base as safetensors.",
        )
    return TensorRef(spec, ref.source, spec)


def _replaced(checkpoint: Checkpoint, dense: Mapping[str, TensorRef]) -> Checkpoint:
    """Each dense matrix at the place, and in the shard, of the first of its parts.

    Matrices that share a part follow one another.
    """
    owners: dict[str, list[str]] = {}
    for name, ref in dense.items():
        if isinstance(ref.source, Encoded):
            for part in (*ref.source.parts.values(), *ref.source.rest):
                owners.setdefault(part.stored.name, []).append(name)
    tensors: dict[str, TensorRef] = {}
    shards: dict[str, str] = {}
    for name, ref in checkpoint.tensors.items():
        for owner in owners.get(name, [name]):
            tensors.setdefault(owner, dense.get(owner, ref))
            shards.setdefault(owner, checkpoint.shards[name])
    unknown = [name for name, ref in tensors.items() if _is_coded(ref)]
    if unknown:
        raise InputError(
            "some of the base's weights are quantised in a way that its config does not say",
            where=str(checkpoint.root),
            problems=[f"{name}: {tensors[name].spec.dtype.label}" for name in unknown],
        )
    return replace(checkpoint, tensors=tensors, shards=shards)


def _is_coded(ref: TensorRef) -> bool:
    """Whether it is a matrix of codes. Indices and masks are of other types, or no matrices."""
    return ref.spec.dtype.bits <= 8 and ref.spec.dtype is not DType.BOOL and len(ref.spec.shape) > 1


def _without(config: Json) -> Json:
    """The config less what declares the quantisation, in its nested parts too."""
    kept: dict[str, Any] = {key: value for key, value in config.items() if key not in DECLARED_IN}
    return {k: _without(v) if isinstance(v, dict) else v for k, v in kept.items()}
