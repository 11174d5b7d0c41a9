"""Files to the canonical adapter, by a description of their layout."""

from __future__ import annotations

from collections.abc import Iterator

from dora_convert.core.adapter import (
    Adapter,
    DoraModule,
    LayerKind,
    MagnitudeAxis,
    RowOrder,
)
from dora_convert.core.assembly import check_replaced, common_axis, linear, magnitude
from dora_convert.core.bundle import Bundle
from dora_convert.core.deltas import LowRank
from dora_convert.core.spec.configs import Scaling, holds, open_fields, scaling
from dora_convert.core.spec.names import MODULE
from dora_convert.core.spec.placing import Module, is_any, place
from dora_convert.core.spec.values import Dim, Part, Spec
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError

__all__ = ["read", "row_orders"]


def read(spec: Spec, bundle: Bundle, axis: MagnitudeAxis | None = None) -> Adapter:
    """See `AdapterFormat.read`."""
    return _Reading(spec, bundle, axis).adapter()


def row_orders(spec: Spec, path: str) -> tuple[RowOrder, RowOrder]:
    """The orders that the layout has for a module's `up` and magnitude."""
    for rows in spec.rows:
        if is_any(path, rows.modules):
            return rows.up, rows.magnitude
    return RowOrder.SAME, RowOrder.SAME


class _Reading:
    """One bundle on its way: each step adds to `problems`, and none stops at them."""

    def __init__(self, spec: Spec, bundle: Bundle, axis: MagnitudeAxis | None) -> None:
        self.spec = spec
        self.bundle = bundle
        self.given = axis
        self.problems: list[str] = []
        self.undecided: list[str] = []
        self.notes = list(spec.notes)
        self.placed = place(spec, bundle.tensors, self.problems)
        self.deltas = dict(self._deltas())

    def adapter(self) -> Adapter:
        spec, problems = self.spec, self.problems
        fields = open_fields(spec, self.bundle, problems)
        self._refuse()
        self._check_magnitudes()
        found = (
            scaling(spec, self.bundle, fields, problems) if spec.scales and self.deltas else None
        )
        modules, is_open = common_axis(
            {path: self._module(path, found) for path in sorted(self.placed.modules)},
            self.undecided,
            problems,
        )
        if not modules:
            problems.append("the file holds no DoRA module")
        check_replaced(self.placed.replaced, problems)
        adapter = Adapter(
            format=spec.name,
            modules=modules,
            replaced=self.placed.replaced,
            base_model=(fields.text(spec.base_model) or None) if spec.base_model else None,
            is_axis_open=is_open,
            is_scaling_open=bool(self.deltas) and not spec.saves_scaling,
            notes=tuple(self.notes),
        )
        if problems:
            raise InputError(
                "the adapter cannot be used as it is",
                where=(str(self.bundle.root), f"read as {spec.name}: {spec.title}"),
                problems=problems,
                hint="Tensors that may be left out are named with --ignore GLOB."
                if any("not understood" in problem for problem in problems)
                else "",
            )
        return adapter

    def _deltas(self) -> Iterator[tuple[str, LowRank]]:
        for path, module in sorted(self.placed.modules.items()):
            held, layout = module.tensors, module.layout
            absent = [role for role in ("down", "up") if role not in held]
            if len(absent) == 2 and self.spec.magnitude_only:
                continue
            if absent:
                there = ", ".join(ref.stored.name for ref in held.values())
                self.problems += [
                    f"{path}: {_called(part, module)} is missing (there is {there})"
                    for role, part in layout.parts()
                    if role in absent
                ]
                continue
            down = _turned(held["down"], layout.down, ("in", "rank"))
            up = _turned(held["up"], layout.up, ("rank", "out"))
            delta = linear(path, down, up, self.problems)
            if delta is not None:
                yield path, delta

    def _refuse(self) -> None:
        for refusal in self.spec.refusals:
            condition = refusal.condition
            found = bool(condition.names or condition.config) and holds(
                condition, self.spec, self.bundle
            )
            if found or any(self._is_shaped(path, refusal.magnitude) for path in self.deltas):
                self.problems.append(refusal.why)

    def _is_shaped(self, path: str, shape: tuple[Dim, ...]) -> bool:
        """Whether the magnitude has this shape, and not the one that it should have."""
        module = self.placed.modules[path]
        vector = module.tensors.get("magnitude")
        if vector is None or not shape:
            return False
        delta = self.deltas[path]
        usual = _sizes(module.layout.magnitude.shape, delta)
        return vector.spec.shape == _sizes(shape, delta) != usual

    def _check_magnitudes(self) -> None:
        """What is there against what the config says."""
        spec = self.spec
        modules = self.placed.modules
        without = [path for path, module in modules.items() if "magnitude" not in module.tensors]
        declared = any(holds(condition, spec, self.bundle) for condition in spec.declares)
        if without and len(without) == len(modules):
            if declared or not spec.plain:
                says = f"{spec.config} says that this is a DoRA, but " if declared else ""
                self.problems.append(
                    f"{says}none of the {len(modules)} modules has a magnitude: what they were "
                    "cannot be recovered from this file"
                )
            else:
                self.notes.append("plain LoRA: the adapter holds no magnitude")
        elif without:
            self.problems += [
                f"{path}: {_called(modules[path].layout.magnitude, modules[path])} is missing"
                for path in without
            ]
        elif modules and spec.declares and not declared:
            self.notes.append(
                f"{spec.config} does not say that this is a DoRA, but the magnitudes are there: "
                "taken as one"
            )

    def _module(self, path: str, found: Scaling | None) -> DoraModule:
        module = self.placed.modules[path]
        delta = self.deltas.get(path)
        layout = module.layout
        vector, axis = self._magnitude(path, module)
        weight = module.tensors.get("weight")
        if weight is not None and layout.weight is not None:
            weight = _turned(weight, layout.weight, ("in", "out"))
            if delta is not None and weight.spec.shape != delta.shape:
                self.problems.append(
                    f"{path}: its own copy of the base is {list(weight.spec.shape)}, the update "
                    f"{list(delta.shape)}"
                )
        up_order, magnitude_order = row_orders(self.spec, path)
        return DoraModule(
            path,
            delta,
            vector,
            axis,
            1.0 if delta is None else self._scaling(path, delta, found),
            weight,
            layout.kind,
            self.spec.magnitude_is,
            self.spec.bias_rule,
            up_order,
            magnitude_order,
        )

    def _magnitude(self, path: str, module: Module) -> tuple[TensorRef | None, MagnitudeAxis]:
        stored = module.tensors.get("magnitude")
        declared = module.layout.magnitude
        # What a user says of the axis is said of linear layers, against the description.
        is_linear = module.layout.kind is LayerKind.LINEAR
        given = self.given if is_linear else None
        axis = given or declared.axis or (None if is_linear else MagnitudeAxis.OUT)
        if stored is None:
            return None, axis or MagnitudeAxis.OUT
        delta = self.deltas.get(path)
        count = stored.spec.numel
        resolved = magnitude(
            path,
            stored,
            (count, count) if delta is None else delta.shape,
            self.problems,
            axis=axis,
            undecided=self.undecided,
        )
        if resolved is None:
            return None, axis or MagnitudeAxis.OUT
        wanted = _sizes(declared.shape, delta, count)
        if wanted and given is None and stored.spec.shape != wanted:
            self.problems.append(
                f"{path}: the magnitude is {list(stored.spec.shape)}, expected {list(wanted)}"
            )
        return resolved

    def _scaling(self, path: str, delta: LowRank, found: Scaling | None) -> float:
        alpha = self.placed.modules[path].tensors.get("alpha")
        if alpha is not None:
            value = self.bundle.scalars.get(alpha.stored.name)
            if value is not None:
                return value / delta.rank
            self.problems.append(
                f"{path}: {alpha.stored.name} {list(alpha.spec.shape)} is not one finite number"
            )
        if found is None:
            return 1.0
        if found.rank is not None and found.rank != delta.rank:
            self.problems.append(
                f"{path}: the rank is {found.rank:g} by the config, {delta.rank} by the tensors"
            )
        return found.of(delta.rank)


def _called(part: Part, module: Module) -> str:
    """What the tensor would be called in the file."""
    return part.name.fill({MODULE: module.stored}) or part.name.text


def _turned(ref: TensorRef, part: Part, turned: tuple[Dim, ...]) -> TensorRef:
    """The canonical orientation; what is no matrix is left for the check to come."""
    is_matrix = len(ref.spec.shape) == 2
    return ref.transposed() if is_matrix and part.shape == turned else ref


def _sizes(shape: tuple[Dim, ...], delta: LowRank | None, count: int = 0) -> tuple[int, ...]:
    out, inner = (count, count) if delta is None else delta.shape
    sizes = {"out": out, "in": inner}
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
