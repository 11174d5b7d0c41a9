"""GGUF: blocks of bytes along each row, in the types of ggml, under llama.cpp's names.

Source: gguf-py (`quants.py`, `tensor_mapping.py`) and llama.cpp's converter. All that differs from
transformers is undone here: names, the order of q and k's rows, the 1 in Gemma's norms, and experts
stacked in one tensor. Read only: most types cannot be written without llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dora_convert.core.bundle import Json
from dora_convert.core.extras import required
from dora_convert.core.llama_cpp import EXPERTS, MODELS, Model, count_of, turned_heads
from dora_convert.core.protocols import Dequantizer
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.core.tensors import DType, TensorSpec
from dora_convert.errors import InputError
from dora_convert.quant._scheme import dense_type, reject, shown, stated

__all__ = ["QUANTIZER", "BlocksGGUF"]

_ENDS = ("model.embed_tokens", "model.norm", "lm_head")
_FUSED = ("self_attn.qkv_proj", "mlp.gate_up_proj")
_LAYER = (
    *(f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj", "gate")),
    *(f"mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
    *(f"mlp.experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
    "mlp.shared_expert_gate",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_STACKED = "mlp.experts."


class BlocksGGUF:
    """Every tensor of the file is one of it, those of plain floats too."""

    title = "GGUF"
    on_host: tuple[str, ...] = ("blocks",)  # gguf decodes with NumPy

    def detect(self, config: Json) -> bool:
        """See `Dequantizer.detect`; said by what reads the file, for its config.json does not."""
        return stated(config, "gguf") is not None

    def find(
        self, config: Json, tensors: Mapping[str, TensorSpec], load: Callable[[str], bytes]
    ) -> Mapping[str, QuantizedWeight]:
        """See `Dequantizer.find`. Raises MismatchError for a config without numbers of layers."""
        words = stated(config, "gguf") or {}
        types = words.get("types")
        if not isinstance(types, dict):
            raise InputError("config.json says that the weights are GGUF, and they are not")
        model = _model(config, words.get("architecture"))
        finder = _Finder(config, model, _names(model, count_of(config, "num_hidden_layers")))
        problems: list[str] = []
        found: dict[str, QuantizedWeight] = {}
        for name, spec in tensors.items():
            for weight in finder.weights(spec, types[name], problems):
                found[weight.dense.name] = weight
        reject(self.title, problems)
        return found

    def windows(self, weight: QuantizedWeight, start: int, stop: int) -> Mapping[str, Window]:
        """See `Dequantizer.windows`; of reordered rows all of a head."""
        head, first = _head_rows(weight), weight.settings["first"]
        begin, end = start // head * head, -(-stop // head) * head
        return {"blocks": Window(first + begin, first + end)}

    def dequantize(
        self, weight: QuantizedWeight, parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Tensor:
        """See `Dequantizer.dequantize`."""
        values = _values(parts["blocks"], weight.settings["type"])
        head = _head_rows(weight)
        if head > 1:
            pairs = values.view(-1, head // 2, 2, weight.columns)
            values = pairs.transpose(1, 2).reshape(-1, weight.columns)
            values = values[start % head :][: stop - start]
        return values - 1 if weight.settings["shifted"] else values


@dataclass(frozen=True)
class _Finder:
    """`names` are transformers' paths by llama.cpp's."""

    config: Json
    model: Model
    names: Mapping[str, str]

    def weights(
        self, spec: TensorSpec, number: int, problems: list[str]
    ) -> Iterator[QuantizedWeight]:
        """What a stored tensor stands for: one weight, or those of all experts."""
        stem, _, leaf = spec.name.rpartition(".")
        path = self.names.get(stem)
        if path is None or leaf not in ("weight", "bias"):
            problems.append(f"{spec.name}: no tensor of this name is known in {self.model.arch}")
            return
        columns = _columns(spec, number)
        if columns is None:
            problems.append(f"{spec.name}: the installed gguf cannot decode type {number}")
            return
        shape = (*spec.shape[:-1], columns)
        if path == "model.embed_tokens" and shape[0] != self.config.get("vocab_size", shape[0]):
            problems.append(
                f"{spec.name}: {shape[0]} words, and config.json says {self.config['vocab_size']}"
            )
        elif len(shape) == 3 and _STACKED in path:
            yield from self._experts(path, spec, number, shape)
        elif len(shape) > 2:
            problems.append(f"{spec.name}: {shown(spec)} is not known")
        else:
            yield from self._one(f"{path}.{leaf}", spec, number, shape, problems)

    def _one(
        self, name: str, spec: TensorSpec, number: int, shape: tuple[int, ...], problems: list[str]
    ) -> Iterator[QuantizedWeight]:
        path = name.rpartition(".")[0]
        heads = turned_heads(path, self.model, self.config)
        if heads and shape[0] % (2 * heads):
            problems.append(f"{spec.name}: {shape[0]} rows do not divide into {heads} heads")
            return
        # A vector is a column: its entries are rows. A gate of one row may be stored as a vector.
        stored = spec.shape
        vector: tuple[int, ...] = ()
        if len(shape) == 1 and path.endswith("shared_expert_gate"):
            shape, stored = (1, *shape), (1, *stored)
        elif len(shape) == 1:
            if spec.dtype is DType.U8:
                problems.append(f"{spec.name}: a vector in blocks is not known")
                return
            vector, shape, stored = shape, (*shape, 1), (*stored, 1)
        settings = {
            "type": number,
            "first": 0,
            "heads": heads,
            "shifted": int(self.model.shifted and path.endswith("norm")),
        }
        dense = TensorSpec(name, self._dense(spec), shape)
        parts = {"blocks": TensorSpec(spec.name, spec.dtype, stored)}
        yield QuantizedWeight(dense, parts, settings, vector)

    def _experts(
        self, path: str, spec: TensorSpec, number: int, shape: tuple[int, ...]
    ) -> Iterator[QuantizedWeight]:
        """One weight an expert, as transformers saves them."""
        experts, rows, columns = shape
        stored = TensorSpec(spec.name, spec.dtype, (experts * rows, spec.shape[-1]))
        before, after = path.split(_STACKED)
        for i in range(experts):
            name = f"{before}{_STACKED}{i}.{after}.weight"
            settings = {"type": number, "first": i * rows, "heads": 0, "shifted": 0}
            dense = TensorSpec(name, self._dense(spec), (rows, columns))
            yield QuantizedWeight(dense, {"blocks": stored}, settings)

    def _dense(self, spec: TensorSpec) -> DType:
        return dense_type(self.config) if spec.dtype is DType.U8 else spec.dtype


def _model(config: Json, stored: object) -> Model:
    """The model that the config's class is, if the file holds one of it."""
    known = {**MODELS, **EXPERTS}
    name = (config.get("architectures") or ["none"])[0]
    if name not in known:
        raise InputError(
            f"a GGUF file of {name} cannot be read",
            where="config.json: 'architectures'",
            hint=f"Known here: {', '.join(sorted(known))}. Give the model that it was made from.",
        )
    library = required("gguf", "gguf", "a GGUF file")
    wanted = library.MODEL_ARCH_NAMES[library.MODEL_ARCH[known[name].arch]]
    if stored != wanted:
        raise InputError(
            f"the GGUF file holds a model of {stored!r:.60}, and config.json is that of {name}, "
            f"which llama.cpp calls {wanted}"
        )
    return known[name]


def _names(model: Model, layers: int) -> dict[str, str]:
    library = required("gguf", "gguf", "a GGUF file")
    known = library.get_tensor_name_map(library.MODEL_ARCH[model.arch], layers)
    # Where q, k and v are one, gate and up are too, and stored under the name of up.
    fused = known.get_name(f"model.layers.0.{_FUSED[0]}") is not None
    leaves = (*_FUSED, *_LAYER) if fused else _LAYER
    paths = (*_ENDS, *(f"model.layers.{i}.{leaf}" for i in range(layers) for leaf in leaves))
    found: dict[str, str] = {}
    for path in paths:
        name = known.get_name(path)
        if name is not None:
            found.setdefault(name, path)
    return found


def _columns(spec: TensorSpec, number: int) -> int | None:
    """Elements of a row; None for a type that cannot be decoded."""
    if spec.dtype is not DType.U8:
        return spec.shape[-1] if spec.dtype is not DType.F64 else None
    sizes = _block(number)
    return spec.shape[-1] // sizes[1] * sizes[0] if sizes is not None else None


@cache
def _block(number: int) -> tuple[int, int] | None:
    """Elements and bytes of a block; None for a type that cannot be decoded."""
    library = required("gguf", "gguf", "a GGUF file")
    kind = library.GGMLQuantizationType(number)
    elements, nbytes = library.GGML_QUANT_SIZES[kind]
    try:
        library.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except NotImplementedError:
        return None
    return elements, nbytes


def _values(stored: Tensor, number: int) -> Tensor:
    if stored.dtype is not torch.uint8:
        return stored.float()
    library = required("gguf", "gguf", "a GGUF file")
    with np.errstate(all="ignore"):  # what is not finite is counted later
        kind = library.GGMLQuantizationType(number)
        values: Tensor = torch.from_numpy(library.quants.dequantize(stored.numpy(), kind))
    return values


def _head_rows(weight: QuantizedWeight) -> int:
    """How many rows are reordered among themselves."""
    heads = weight.settings["heads"]
    return weight.rows // heads if heads else 1


QUANTIZER: Final[Dequantizer] = BlocksGGUF()
