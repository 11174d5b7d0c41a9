"""An adapter laid out as PEFT's own `save_pretrained` does: keys, shapes and config.

Source: peft 0.21, `utils/save_and_load.py` and `tuners/lora/`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dora_convert.core.adapter import Adapter, DoraModule, LayerKind
from dora_convert.core.bundle import Bundle
from dora_convert.core.capacity import Capacity, losses
from dora_convert.core.deltas import LowRank
from dora_convert.core.peft_config import CONFIG
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError

__all__ = ["PEFT_PREFIX", "alpha_of", "lora_config", "peft_bundle", "peft_parts", "unlike"]

PEFT_PREFIX = "base_model.model."

T = TypeVar("T")

_CAPACITY = Capacity(
    kinds=frozenset({LayerKind.EMBEDDING, LayerKind.CONVOLUTION}),
    plain=True,
    replaced=True,
    token_rows=True,
    weights=True,
)


def peft_bundle(adapter: Adapter) -> Bundle:
    """Names and views, and `adapter_config.json`.

    Raises InputError for what PEFT has no place for.
    """
    problems = losses(adapter, _CAPACITY)
    problems += unlike(adapter)
    if problems:
        raise InputError("PEFT's layout cannot hold this adapter", problems=problems)
    tensors: dict[str, TensorRef] = {}
    for path, module in adapter.modules.items():
        for part, ref in peft_parts(module):
            tensors[f"{PEFT_PREFIX}{path}.{part}"] = ref
    for path, rows in adapter.token_rows.items():
        name = f"{PEFT_PREFIX}{path}.token_adapter."
        tensors[name + "trainable_tokens_delta"] = rows.rows
        if rows.weight is not None:
            tensors[name + "base_layer.weight"] = rows.weight
    for name, ref in adapter.replaced.items():
        tensors[PEFT_PREFIX + _saved_name(name, adapter)] = ref
    renamed = {name: tensors[name].renamed(name) for name in sorted(tensors)}
    return Bundle(Path(), renamed, {CONFIG: lora_config(adapter)})


def unlike(adapter: Adapter) -> list[str]:
    """Modules that cannot be in one config of PEFT, or have no shape there."""
    problems = []
    modules = adapter.modules.values()
    by_magnitude = Counter(module.magnitude is not None for module in modules)
    if len(by_magnitude) > 1:
        problems.append(
            f"{by_magnitude[False]} modules have no magnitude and {by_magnitude[True]} have one: "
            "use_dora holds for all"
        )
    return problems + [
        f"{module.path}: a convolution, of whose kernel the file says nothing"
        for module in modules
        if _is_conv(module) and module.factors is not None and not module.factors.kernel
    ]


def peft_parts(module: DoraModule) -> Iterator[tuple[str, TensorRef]]:
    """A module's tensors by what comes after its path, in PEFT's shapes."""
    delta, vector = module.factors, module.magnitude
    assert delta is not None
    if module.kind is LayerKind.EMBEDDING:
        yield "lora_embedding_A", delta.up.transposed()
        yield "lora_embedding_B", delta.down.transposed()
    else:
        down, up, vector = _kernels(delta, vector) if _is_conv(module) else (*_pair(delta), vector)
        yield "lora_A.weight", down
        yield "lora_B.weight", up
    if vector is not None:
        yield "lora_magnitude_vector", vector
    if module.weight is not None:
        yield "base_layer.weight", module.weight


def _is_conv(module: DoraModule) -> bool:
    return module.kind is LayerKind.CONVOLUTION


def _pair(delta: LowRank) -> tuple[TensorRef, TensorRef]:
    return delta.down, delta.up


def _kernels(
    delta: LowRank, vector: TensorRef | None
) -> tuple[TensorRef, TensorRef, TensorRef | None]:
    """`[rank, in, k...]`, `[out, rank, 1...]` and `[1, out, 1...]`, as convolutions have them."""
    ones = (1,) * (len(delta.down.stored.shape) - 2)
    out, rank = delta.up.spec.shape
    return (
        delta.down.reshaped(*delta.down.stored.shape),
        delta.up.reshaped(out, rank, *ones),
        vector.reshaped(1, out, *ones) if vector is not None else None,
    )


def _saved_name(name: str, adapter: Adapter) -> str:
    """A bias of an adapted layer is one of the layer that PEFT wraps."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.bias" if leaf == "bias" and path in adapter.modules else name


def lora_config(adapter: Adapter) -> dict[str, Any]:
    """What PEFT has in `adapter_config.json`; ranks and alphas by pattern where they differ."""
    ranks = {path: m.delta.rank for path, m in adapter.modules.items() if m.delta is not None}
    alphas = {path: alpha_of(adapter.modules[path].scaling, rank) for path, rank in ranks.items()}
    rank, alpha = _commonest(ranks, 8), _commonest(alphas, 8)
    return {
        "peft_type": "LORA",
        "task_type": adapter.task,
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        # Whole paths: which ends of them are unique only the base can tell.
        "target_modules": sorted(adapter.modules),
        "lora_dropout": 0.0,
        "bias": _bias(adapter),
        "use_dora": any(m.magnitude is not None for m in adapter.modules.values()),
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": adapter.meets_transposed,
        "modules_to_save": _modules_to_save(adapter) or None,
        "trainable_token_indices": {p: list(r.indices) for p, r in adapter.token_rows.items()}
        or None,
        "ensure_weight_tying": adapter.keeps_ties,
        "inference_mode": True,
    }


def alpha_of(scaling: float, rank: int) -> float | int:
    """The alpha for which `alpha / rank` is `scaling` again, bit for bit where there is one."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    alpha = next((a for a in near if a / rank == scaling), alpha)
    return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha


def _commonest(values: Mapping[str, T], default: T) -> T:
    # The first of equals, so that the same adapter gives the same file.
    return Counter(values.values()).most_common(1)[0][0] if values else default


def _pattern(values: Mapping[str, T], common: T) -> dict[str, T]:
    """By whole path, anchored: a path may be the end of another's."""
    return {f"^{path}": value for path, value in sorted(values.items()) if value != common}


def _bias(adapter: Adapter) -> str:
    """Which biases PEFT is to load; those of modules that were saved whole go with them."""
    saved = _modules_to_save(adapter)
    paths = [n.rpartition(".")[0] for n in adapter.replaced if n.endswith(".bias")]
    loose = [path for path in paths if path not in saved]
    if not loose:
        return "none"
    return "lora_only" if all(path in adapter.modules for path in loose) else "all"


def _modules_to_save(adapter: Adapter) -> list[str]:
    return sorted({n.rpartition(".")[0] for n in adapter.replaced if not n.endswith(".bias")})
