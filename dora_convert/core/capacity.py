"""What a layout of adapter files can hold, as data, and what of an adapter would be lost in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dora_convert.core.adapter import (
    Adapter,
    BiasRule,
    DoraModule,
    LayerKind,
    MagnitudeAxis,
    MagnitudeKind,
    RowOrder,
)
from dora_convert.core.deltas import Hadamard, Kronecker, Tucker
from dora_convert.core.tensors import COMPONENT_MARK

__all__ = ["Capacity", "losses"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the programs that load a layout understand.

    `kinds`: layers other than linear ones. `axes`: what a magnitude may belong to; an embedding's,
    of the stored `[vocab, dim]`, to `embedding_axis`. `plain`: modules
    without a magnitude; `magnitude_only`: modules without factors. `magnitudes`: what its values
    mean. `bias`: what its forward does with a bias. `one_scaling`: it has one scaling for all.
    `replaced`, `token_rows`, `weights`: tensors trained whole, single rows, copies of the base's.
    `pipelines`: modules of several models.
    """

    kinds: frozenset[LayerKind] = frozenset()
    axes: frozenset[MagnitudeAxis] = frozenset({MagnitudeAxis.OUT})
    embedding_axis: MagnitudeAxis = MagnitudeAxis.IN
    magnitudes: MagnitudeKind = MagnitudeKind.NORM
    bias: BiasRule = BiasRule.KEEP
    plain: bool = False
    magnitude_only: bool = False
    one_scaling: bool = False
    replaced: bool = False
    token_rows: bool = False
    weights: bool = False
    pipelines: bool = False


def losses(adapter: Adapter, capacity: Capacity) -> list[str]:
    """Every reason why the layout cannot hold the adapter; nothing may be dropped in silence."""
    found = [text for module in adapter.modules.values() for text in _module(module, capacity)]
    if any(COMPONENT_MARK in path for path in adapter.modules) and not capacity.pipelines:
        found.append("it is for the models of a pipeline: give the folder of one as the base")
    if adapter.is_place_open:
        found.append("its modules are named as in a file of an image model: give the base")
    if adapter.is_axis_open:
        found.append("what the magnitudes belong to is not known: give the base, or --axis")
    if adapter.is_scaling_open:
        found.append("what the update is multiplied with is not known: give it with --scale")
    scalings = {m.scaling for m in adapter.modules.values() if m.delta is not None}
    if capacity.one_scaling and len(scalings) > 1:
        shown = ", ".join(f"{scaling:g}" for scaling in sorted(scalings)[:4])
        found.append(f"it has one scaling for all modules, here are {len(scalings)} ({shown})")
    if not capacity.replaced:
        found += [f"{name}: a tensor that was trained whole" for name in adapter.replaced]
    if not capacity.token_rows:
        found += [f"{path}: rows of tokens that were trained" for path in adapter.token_rows]
    return found


def _module(module: DoraModule, capacity: Capacity) -> Iterator[str]:
    path = module.path
    if module.delta is not None and module.factors is None:
        yield f"{path}: an update that is no product of two matrices ({_FORMS[type(module.delta)]})"
    if module.kind is not LayerKind.LINEAR and module.kind not in capacity.kinds:
        yield f"{path}: an adapted {module.kind.value}"
    if module.delta is None and not capacity.magnitude_only:
        yield f"{path}: a magnitude without factors"
    if module.magnitude is None and not capacity.plain:
        yield f"{path}: factors without a magnitude"
    if module.magnitude is not None:
        yield from _magnitude(module, capacity)
    if {module.up_order, module.magnitude_order} != {RowOrder.SAME}:
        yield f"{path}: rows in another order than the base's: give the base, which settles it"
    if module.weight is not None and not capacity.weights:
        yield f"{path}: a copy of its base weight"


def _magnitude(module: DoraModule, capacity: Capacity) -> Iterator[str]:
    path = module.path
    embedding = module.kind is LayerKind.EMBEDDING
    if module.axis not in ({capacity.embedding_axis} if embedding else capacity.axes):
        yield f"{path}: a magnitude per {module.axis.value}put"
    if module.magnitude_is is not capacity.magnitudes:
        wanted = "m / ||V||" if capacity.magnitudes is MagnitudeKind.FACTOR else "m"
        yield f"{path}: a magnitude whose values are not {wanted}"
    if module.bias_rule not in (capacity.bias, BiasRule.NONE):
        yield (
            f"{path}: a bias that is {_BIAS[module.bias_rule]}, where this layout's is "
            f"{_BIAS[capacity.bias]}; give the base: without a bias there it does not matter"
        )


_FORMS = {Tucker: "Tucker", Hadamard: "LoHa", Kronecker: "LoKr"}
_BIAS = {BiasRule.KEEP: "kept", BiasRule.SCALED: "scaled with the row"}
