"""The canonical adapter to files, by a description of their layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dora_convert.core.adapter import (
    Adapter,
    BiasRule,
    DoraModule,
    LayerKind,
    MagnitudeAxis,
    RowOrder,
)
from dora_convert.core.bundle import Bundle
from dora_convert.core.capacity import Capacity, losses
from dora_convert.core.fields import Fields
from dora_convert.core.peft_files import alpha_of
from dora_convert.core.spec.configs import resolved
from dora_convert.core.spec.names import MODULE
from dora_convert.core.spec.placing import layout_of, renamed
from dora_convert.core.spec.reading import read, row_orders
from dora_convert.core.spec.values import Dim, Layout, Part, Spec
from dora_convert.core.tensors import Reshaped, TensorRef
from dora_convert.errors import InputError

__all__ = ["capacity", "write"]


def capacity(spec: Spec) -> Capacity:
    """What the layout can hold."""
    axis = spec.linear.magnitude.axis
    embedding = spec.embedding.magnitude.axis if spec.embedding is not None else None
    return Capacity(
        kinds=frozenset(layout.kind for layout in spec.layouts),
        axes=frozenset(MagnitudeAxis if axis is None else {axis}),
        embedding_axis=embedding or MagnitudeAxis.OUT,
        magnitudes=spec.magnitude_is,
        bias=spec.bias_rule,
        plain=spec.plain,
        magnitude_only=spec.magnitude_only,
        replaced=bool(spec.replaced) or spec.linear.bias is not None,
        weights=spec.linear.weight is not None,
    )


def write(spec: Spec, adapter: Adapter) -> Bundle:
    """See `AdapterFormat.write`."""
    problems = losses(_less_own_orders(spec, adapter), capacity(spec))
    if adapter.is_scaling_open:
        problems.append("what the update is multiplied with is not known: give it with --scale")
    tensors: dict[str, TensorRef] = {}
    stored: list[str] = []
    for path, module in adapter.modules.items():
        problems += _unlike(spec, module)
        name = _stored(path, spec)
        if name is None:
            problems.append(f"{path}: no name in this layout becomes that path")
            continue
        stored.append(name)
        for part, ref in _parts(layout_of(path, spec), module):
            _put(tensors, spec, part, name, ref, problems)
    for name, ref in adapter.replaced.items():
        _put_replaced(tensors, spec, adapter, name, ref, problems)
    documents = _documents(spec, adapter, stored, problems)
    bundle = Bundle(Path(), tensors, documents)
    if not problems:
        problems = _misread(spec, adapter, bundle)
    if problems:
        raise InputError(
            f"the adapter cannot be written as {spec.name} ({spec.title})",
            problems=list(dict.fromkeys(problems)),
        )
    return bundle


def _unlike(spec: Spec, module: DoraModule) -> Iterator[str]:
    """What `Capacity` cannot say: it depends on the module's name, or on numbers."""
    path = module.path
    layout = layout_of(path, spec)
    if layout.kind is not module.kind:
        yield f"{path}: an adapted {module.kind.value}, which here is a {layout.kind.value}"
    # Only where the layout has an order of its own; the usual one is the capacity's to ask for.
    if row_orders(spec, path) not in (_USUAL, (module.up_order, module.magnitude_order)):
        yield f"{path}: its rows are in another order than this layout's"


_USUAL = (RowOrder.SAME, RowOrder.SAME)


def _less_own_orders(spec: Spec, adapter: Adapter) -> Adapter:
    """With the rows that are as this layout has them taken for usual: no loss."""
    modules = {
        path: replace(module, up_order=RowOrder.SAME, magnitude_order=RowOrder.SAME)
        if row_orders(spec, path) == (module.up_order, module.magnitude_order)
        else module
        for path, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _parts(layout: Layout, module: DoraModule) -> Iterator[tuple[Part, TensorRef]]:
    if module.factors is not None:
        yield layout.down, _turned(module.factors.down, layout.down, ("in", "rank"))
        yield layout.up, _turned(module.factors.up, layout.up, ("rank", "out"))
    if module.magnitude is not None:
        count = module.magnitude.spec.numel
        shape = (
            dim if isinstance(dim, int) else count for dim in layout.magnitude.shape or (count,)
        )
        yield layout.magnitude, module.magnitude.reshaped(*shape)
    if module.weight is not None and layout.weight is not None:
        yield layout.weight, _turned(module.weight, layout.weight, ("in", "out"))


def _turned(ref: TensorRef, part: Part, turned: tuple[Dim, ...]) -> TensorRef:
    return ref.transposed() if part.shape == turned else ref


def _put(
    tensors: dict[str, TensorRef],
    spec: Spec,
    part: Part,
    stored: str,
    ref: TensorRef,
    problems: list[str],
) -> None:
    name = part.name.fill({MODULE: stored})
    if name is None:
        problems.append(f"a name of this layout is not known in full: {part.name.text}")
        return
    _add(tensors, spec.prefixes[0] + name, ref, problems)


def _put_replaced(
    tensors: dict[str, TensorRef],
    spec: Spec,
    adapter: Adapter,
    name: str,
    ref: TensorRef,
    problems: list[str],
) -> None:
    path, dot, leaf = name.rpartition(".")
    stored = _stored(path, spec) if path else ""
    bias = layout_of(path, spec).bias
    if stored is None:
        problems.append(f"{name}: no name in this layout becomes that path")
    elif bias is not None and leaf == "bias" and path in adapter.modules:
        _put(tensors, spec, bias, stored, ref, problems)
    else:
        _add(tensors, f"{spec.prefixes[0]}{stored}{dot}{leaf}", ref, problems)


def _add(tensors: dict[str, TensorRef], name: str, ref: TensorRef, problems: list[str]) -> None:
    if name in tensors:
        problems.append(f"two tensors would be called {name}")
    tensors[name] = ref.renamed(name)


def _stored(path: str, spec: Spec) -> str | None:
    """The name in the file that is read as `path`."""
    for old, new in spec.renames:
        values = new.match(path)
        name = None if values is None else old.fill(values)
        if name is not None and renamed(name, spec) == path:
            return name
    return path if renamed(path, spec) == path else None


# The config


def _documents(
    spec: Spec, adapter: Adapter, stored: list[str], problems: list[str]
) -> dict[str, Mapping[str, Any]]:
    updates = [(m.scaling, m.delta.rank) for m in adapter.modules.values() if m.delta is not None]
    values: dict[str, Any] = {
        "base_model": adapter.base_model,
        "modules": sorted(stored),
        "leaves": sorted({name.rpartition(".")[2] for name in stored}),
    }
    if updates:
        _check_scalings(spec, adapter, problems)
        values |= {
            "rank": {rank for _, rank in updates},
            "scale": {scaling for scaling, _ in updates},
            "alpha": {alpha_of(scaling, rank) for scaling, rank in updates},
        }
    if spec.config is None or spec.document is None:
        return {}
    return {spec.config: _filled(spec.document, values, problems)}


def _check_scalings(spec: Spec, adapter: Adapter, problems: list[str]) -> None:
    if any(scale.keys for scale in spec.scales):
        if spec.document is None:
            problems.append("the scaling is in a config, and no [write] says how that is written")
        return
    if not spec.saves_scaling:
        problems.append("the scaling is not saved in this layout")
    constant = resolved(spec.scales[0], Fields({}, "", problems)) if spec.scales else None
    for path, module in adapter.modules.items():
        if module.delta is None:
            continue
        if spec.linear.alpha is not None and module.scaling != 1.0:
            problems.append(
                f"{path}: its scaling is {module.scaling:g}, and alpha tensors are not written"
            )
        fixed = None if constant is None else constant.of(module.delta.rank)
        if fixed is not None and fixed != module.scaling:
            problems.append(
                f"{path}: its scaling is {module.scaling:g}, where this layout's is {fixed:g}"
            )


def _filled(template: Mapping[str, Any], values: Mapping[str, Any], problems: list[str]) -> Any:
    """The template with values for placeholders; an entry without a value is left out."""
    document: dict[str, Any] = {}
    for key, item in template.items():
        if isinstance(item, Mapping):
            document[key] = _filled(item, values, problems)
            continue
        if not isinstance(item, str) or not item.startswith("{"):
            document[key] = item
            continue
        name = item.strip("{}")
        value = values.get(name)
        if isinstance(value, set):
            if len(value) > 1:
                shown = ", ".join(f"{number:g}" for number in sorted(value)[:4])
                problems.append(
                    f"it has one {name} for all modules, here are {len(value)} ({shown})"
                )
            value = next(iter(value))
        if value is not None:
            document[key] = value
    return document


# Its own output is read back


def _misread(spec: Spec, adapter: Adapter, bundle: Bundle) -> list[str]:
    """What of the adapter would not be read again as it is; a description may be ambiguous."""
    given = None
    if spec.linear.magnitude.axis is None:
        linear = (m.axis for m in adapter.modules.values() if m.kind is LayerKind.LINEAR)
        given = next(linear, None)
    try:
        again = read(spec, bundle, given)
    except InputError as error:
        return [f"it would be read back with errors: {problem}" for problem in error.problems]
    found = [
        f"{path}: would not be read back as it is"
        for path, module in adapter.modules.items()
        if path not in again.modules or not _is_same(again.modules[path], module)
    ]
    found += [
        f"{path}: would be read as a module" for path in again.modules.keys() - adapter.modules
    ]
    found += [
        f"{name}: would not be read back as it is"
        for name, ref in adapter.replaced.items()
        if name not in again.replaced or _content(again.replaced[name]) != _content(ref)
    ]
    return found


def _is_same(one: DoraModule, other: DoraModule) -> bool:
    # Not every scaling is some alpha over the rank to the last bit.
    scalings = math.isclose(one.scaling, other.scaling, rel_tol=4e-16)
    rules = {one.bias_rule, other.bias_rule}
    biases = len(rules) == 1 or BiasRule.NONE in rules
    return scalings and biases and _identity(one) == _identity(other)


def _identity(module: DoraModule) -> object:
    delta = module.delta
    return (
        None if delta is None else tuple(map(_content, delta.tensors)),
        None if module.magnitude is None else (_content(module.magnitude), module.axis),
        None if module.weight is None else _content(module.weight),
        module.kind,
        module.magnitude_is if module.magnitude is not None else None,
        module.up_order,
        module.magnitude_order,
    )


def _content(ref: TensorRef) -> object:
    """Where the elements come from, less the names and the shapes in between."""
    steps = list(ref.view)
    while steps and isinstance(steps[-1], Reshaped):
        steps.pop()
    return ref.source, ref.spec.shape, tuple(steps)
