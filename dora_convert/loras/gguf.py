"""A LoRA as llama.cpp loads it (src/llama-adapter.cpp), in the file format of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Tensors are named and turned as llama.cpp's convert_lora_to_gguf.py does for the `MODELS` of
`core.llama_cpp`.
"""  # noqa: D205

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

from dora_convert.core.adapter import LayerKind
from dora_convert.core.extras import required
from dora_convert.core.llama_cpp import MODELS, Model, count_of, turned_heads
from dora_convert.core.lora import LoraLayer
from dora_convert.core.pairs import Factor, LoraFile, Pair
from dora_convert.core.tensors import TensorSpec
from dora_convert.errors import MismatchError
from dora_convert.planning.lora import Lora, factor_shapes, spelled

__all__ = ["FORMAT"]


_HINT = "Write a PEFT folder (--to peft) and turn it with llama.cpp's convert_lora_to_gguf.py."


class _Gguf:
    title = "llama.cpp"

    def lay_out(self, lora: Lora) -> LoraFile:
        gguf = required("gguf", "gguf", "a GGUF file")
        model = _model(lora)
        pairs = _pairs(lora, model, gguf)
        keys = gguf.Keys
        fields = {
            keys.General.ARCHITECTURE: gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[model.arch]],
            keys.General.TYPE: gguf.GGUFType.ADAPTER,
            keys.Adapter.TYPE: "lora",
            # Divided by each pair's rank when it is loaded.
            keys.Adapter.LORA_ALPHA: float(lora.rank),
        }
        specs = [factor.spec for pair in pairs for factor in (pair.down, pair.up)]
        head, offsets, end = _header(fields, specs, gguf)
        starts = {spec.name: len(head) + at for spec, at in zip(specs, offsets, strict=True)}
        return LoraFile("adapter.gguf", head, MappingProxyType(starts), len(head) + end, pairs)


def _model(lora: Lora) -> Model:
    names = lora.config.get("architectures") or ["missing"]
    if names[0] not in MODELS:
        raise MismatchError(
            f"GGUF adapters of {names[0]} cannot be written",
            where="architectures in the base's config.json",
            hint=f"{_HINT} Known here: {', '.join(MODELS)}.",
        )
    return MODELS[names[0]]


def _pairs(lora: Lora, model: Model, gguf: ModuleType) -> tuple[Pair, ...]:
    layers = count_of(lora.config, "num_hidden_layers")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.arch], layers)
    problems, pairs = [], []
    for layer in lora.layers:
        path = spelled(layer.path, lora.names)
        name = known.get_name(path)
        if name is None:
            problems.append(f"{layer.path}: llama.cpp has no tensor for it")
            continue
        heads = turned_heads(path, model, lora.config)
        if heads and layer.shape[0] % (2 * heads):
            problems.append(f"{layer.path}: {layer.shape[0]} rows do not divide into {heads} heads")
            continue
        pairs.append(_pair(f"{name}.weight", layer, heads, lora))
    if problems:
        raise MismatchError(
            "not all modules have a place in a GGUF adapter", problems=problems, hint=_HINT
        )
    return tuple(pairs)


def _pair(name: str, layer: LoraLayer, heads: int, lora: Lora) -> Pair:
    down, up = factor_shapes(layer, lora.ranks[layer.path])
    # Rows of an embedding are looked up, not multiplied with.
    turned = layer.kind is LayerKind.EMBEDDING
    a = TensorSpec(f"{name}.lora_a", lora.dtype, down[::-1] if turned else down)
    b = TensorSpec(f"{name}.lora_b", lora.dtype, up)
    return Pair(layer, Factor(a, turned=turned), Factor(b, heads=heads))


def _header(
    fields: Mapping[str, Any], specs: Sequence[TensorSpec], gguf: ModuleType
) -> tuple[bytes, list[int], int]:
    """The head, each tensor's offset after it, and where the last one ends."""
    align = gguf.GGUF_DEFAULT_ALIGNMENT
    head = struct.pack("<IIQQ", gguf.GGUF_MAGIC, gguf.GGUF_VERSION, len(specs), len(fields))
    head += b"".join(_field(key, value, gguf) for key, value in fields.items())
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        head += _string(spec.name) + struct.pack("<I", len(spec.shape))
        head += struct.pack(f"<{len(spec.shape)}Q", *reversed(spec.shape))
        head += struct.pack("<IQ", gguf.GGMLQuantizationType[spec.dtype.label], end)
        end += _padded(spec.nbytes, align)
    return head.ljust(_padded(len(head), align), b"\0"), offsets, end


def _field(key: str, value: str | float, gguf: ModuleType) -> bytes:
    if isinstance(value, float):
        kind, data = gguf.GGUFValueType.FLOAT32, struct.pack("<f", value)
    else:
        kind, data = gguf.GGUFValueType.STRING, _string(value)
    return _string(key) + struct.pack("<I", kind) + data


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(size: int, align: int) -> int:
    return size + -size % align


FORMAT = _Gguf()
