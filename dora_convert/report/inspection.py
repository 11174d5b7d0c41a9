"""An adapter, and what was measured of it, as groups of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from dora_convert.core.adapter import Adapter, DoraModule
from dora_convert.core.reports import Figures, Group, Inspection
from dora_convert.core.tensors import TensorRef, stored_name

__all__ = ["inspection"]

T = TypeVar("T", bound=Any)
_Measure = Callable[[Sequence[str]], Figures | None]


def inspection(
    adapter: Adapter,
    *,
    name: str,
    base: str | None = None,
    measure: _Measure = lambda _: None,
    per_module: bool = False,
    notes: Sequence[str] = (),
) -> Inspection:
    """`measure` gives the figures of some module paths together; None where there is no base."""
    by_group: dict[str, list[DoraModule]] = {}
    for path, module in adapter.modules.items():
        key = path if per_module else stored_name(path).rpartition(".")[2]
        by_group.setdefault(key, []).append(module)
    groups = tuple(_group(key, modules, measure) for key, modules in sorted(by_group.items()))
    kinds = sorted({kind for group in groups for kind in group.kinds})
    return Inspection(
        adapter=name,
        format=adapter.format,
        kind=" + ".join(kinds),
        base_model=adapter.base_model,
        base=base,
        modules=len(adapter.modules),
        nbytes=sum(group.nbytes for group in groups),
        groups=groups,
        replaced=tuple(sorted(adapter.replaced)),
        token_rows=sum(len(patch.indices) for patch in adapter.token_rows.values()),
        total=measure(list(adapter.modules)),
        notes=(*adapter.notes, *notes),
    )


def _group(name: str, modules: Sequence[DoraModule], measure: _Measure) -> Group:
    return Group(
        name=name,
        modules=len(modules),
        kinds=_distinct(_kind(m) for m in modules),
        ranks=_distinct(m.delta.rank for m in modules if m.delta is not None),
        scalings=_distinct(m.scaling for m in modules if m.delta is not None),
        axes=_distinct(m.axis.value for m in modules if m.magnitude is not None),
        shapes=_distinct(m.delta.shape for m in modules if m.delta is not None),
        dtypes=_distinct(ref.stored.dtype.label for m in modules for ref in _stored(m)),
        nbytes=sum(ref.stored.nbytes for m in modules for ref in _stored(m)),
        figures=measure([m.path for m in modules]),
    )


def _kind(module: DoraModule) -> str:
    if module.delta is None:
        return "magnitude only"
    return "LoRA" if module.magnitude is None else "DoRA"


def _stored(module: DoraModule) -> Sequence[TensorRef]:
    delta = module.delta.tensors if module.delta is not None else ()
    return delta if module.magnitude is None else (*delta, module.magnitude)


def _distinct(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(sorted(set(values)))
