"""What is a linear layer, and what is left dense, told from a tensor's name and shape."""

from __future__ import annotations

import re

from dora_convert.core.tensors import TensorSpec
from dora_convert.errors import InputError

__all__ = ["check_matrix", "is_linear", "is_matrix_of_a_layer", "module_of"]

# Output heads, embeddings, norms and the routers of mixtures: every scheme for serving leaves
# them in 16 bits, and vLLM builds them unquantised.
_DENSE = re.compile(
    r"(^|\.)(lm_head|score|classifier|router|gate|shared_expert_gate|wte|wpe|[^.]*embed[^.]*|"
    r"[^.]*norm[^.]*|ln_[^.]*)(\.|$)",
    re.IGNORECASE,
)

_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)$")


def module_of(weight: str) -> str:
    """The module that a weight belongs to."""
    return weight.removesuffix(".weight")


def is_linear(dense: TensorSpec) -> bool:
    """Whether it is the weight of a linear layer inside the model."""
    return is_matrix_of_a_layer(dense) and _DENSE.search(module_of(dense.name)) is None


def is_matrix_of_a_layer(dense: TensorSpec) -> bool:
    """Whether it is a float matrix called `weight`, of whatever layer but a router."""
    name = dense.name
    return (
        name.endswith(".weight")
        and len(dense.shape) == 2
        and dense.dtype.is_weight
        and _ROUTER.search(module_of(name)) is None
    )


def check_matrix(dense: TensorSpec, scheme: str, *, columns: int = 1) -> None:
    """Refuse what is no matrix, is empty, or has a row that `columns` does not divide."""
    if len(dense.shape) != 2 or not dense.numel:
        raise InputError(f"{scheme} holds matrices only", where=f"{dense.name} {list(dense.shape)}")
    if dense.shape[1] % columns:
        raise InputError(
            f"{scheme} cannot hold a weight whose in axis is no multiple of {columns}",
            where=f"{dense.name} [out, in] = {list(dense.shape)}",
            hint="Keep it dense with --keep-dense, or choose a scheme without groups.",
        )
