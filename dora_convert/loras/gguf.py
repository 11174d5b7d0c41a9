"""A LoRA as llama.cpp loads it (src/llama-adapter.cpp), in the file format of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Tensors are named and turned as llama.cpp's convert_lora_to_gguf.py does for the models of `MODELS`.
"""  # noqa: D205

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from dora_convert.core.adapter import LayerKind
from dora_convert.core.lora import LoraLayer
from dora_convert.core.pairs import Factor, LoraFile, Pair
from dora_convert.core.tensors import TensorSpec
from dora_convert.errors import InputError, MismatchError
from dora_convert.planning.lora import Lora, factor_shapes, spelled

__all__ = ["FORMAT", "MODELS", "Model"]


class Model(NamedTuple):
    """llama.cpp's name, and whether its rotary embedding wants q and k reordered."""

    arch: str
    permuted: bool = False


# Those whose tensors are renamed and nothing else, but for q and k (conversion/*.py).
MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "Gemma2ForCausalLM": Model("GEMMA2"),
        "Gemma3ForCausalLM": Model("GEMMA3"),
        "GemmaForCausalLM": Model("GEMMA"),
        "GraniteForCausalLM": Model("GRANITE", permuted=True),
        "LlamaForCausalLM": Model("LLAMA", permuted=True),
        "MistralForCausalLM": Model("LLAMA", permuted=True),
        "Olmo2ForCausalLM": Model("OLMO2"),
        "Phi3ForCausalLM": Model("PHI3"),
        "Qwen2ForCausalLM": Model("QWEN2"),
        "Qwen3ForCausalLM": Model("QWEN3"),
    }
)
_HINT = "Write a PEFT folder (--to peft) and turn it with llama.cpp's convert_lora_to_gguf.py."


class _Gguf:
    title = "llama.cpp"

    def lay_out(self, lora: Lora) -> LoraFile:
        gguf = _library()
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


def _library() -> ModuleType:
    try:
        import gguf  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            "GGUF files need the package gguf, which is not installed",
            hint='pip install "dora-convert[gguf]"',
        ) from error
    return gguf


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
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.arch], _count(lora, "num_hidden_layers"))
    problems, pairs = [], []
    for layer in lora.layers:
        path = spelled(layer.path, lora.names)
        name = known.get_name(path)
        if name is None:
            problems.append(f"{layer.path}: llama.cpp has no tensor for it")
            continue
        heads = _heads(path, lora) if model.permuted else 0
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


def _heads(path: str, lora: Lora) -> int:
    """In how many heads the rows of q or k are reordered; 0 for other modules."""
    if path.endswith(".q_proj"):
        return _count(lora, "num_attention_heads")
    if path.endswith(".k_proj"):
        grouped = lora.config.get("num_key_value_heads") is not None
        return _count(lora, "num_key_value_heads" if grouped else "num_attention_heads")
    return 0


def _count(lora: Lora, key: str) -> int:
    value = lora.config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MismatchError(
            f"the base's config.json gives no {key} to write a GGUF adapter by", where=f"{value!r}"
        )
    return value


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
