"""What a description of an adapter layout says, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from dora_convert.core.adapter import BiasRule, LayerKind, MagnitudeAxis, MagnitudeKind, RowOrder
from dora_convert.core.spec.names import NamePattern

__all__ = ["Condition", "Dim", "Layout", "Part", "Refusal", "Rows", "Scale", "Spec"]

Dim: TypeAlias = int | str  # 1, "rank", "in" or "out"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a module: its name, and the shape that it is stored in, if that is fixed."""

    name: NamePattern
    shape: tuple[Dim, ...] = ()

    @property
    def axis(self) -> MagnitudeAxis | None:
        """What a magnitude of this shape belongs to; None: the shape does not say."""
        return next((axis for axis in MagnitudeAxis if axis.value in self.shape), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tensors of one kind of module; `modules` are those that are of it, empty for all others.

    `alpha` is a tensor of one number: the scaling is that number over the rank.
    """

    kind: LayerKind
    modules: tuple[NamePattern, ...] = ()
    down: Part
    up: Part
    magnitude: Part
    weight: Part | None = None
    bias: Part | None = None
    alpha: Part | None = None

    def parts(self) -> Iterator[tuple[str, Part]]:
        """The parts that it has, by role; those that make a module come first."""
        for role in ("down", "up", "magnitude", "weight", "bias", "alpha"):
            part = getattr(self, role)
            if part is not None:
                yield role, part


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """`value * alpha / rank`, or over the square root where `rslora` is set.

    Text is the key of a config entry. Without `alpha` the quotient is left out; without `rank` it
    is that of the tensors.
    """

    value: float | str = 1.0
    alpha: float | str | None = None
    rank: float | str | None = None
    rslora: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The config entries that it needs."""
        return tuple(k for k in (self.value, self.alpha, self.rank) if isinstance(k, str))


@dataclass(frozen=True, slots=True)
class Condition:
    """Names that must be there and config entries that must have a value; empty never holds."""

    names: tuple[NamePattern, ...] = ()
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Rows:
    """The row orders of some modules' tensors."""

    modules: tuple[NamePattern, ...]
    up: RowOrder
    magnitude: RowOrder


@dataclass(frozen=True, slots=True)
class Refusal:
    """Files that look like this layout and cannot be used, and why."""

    why: str
    condition: Condition
    magnitude: tuple[Dim, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One layout. `scales` are tried in order; none means that the scaling is not saved.

    `document` is the config to be written, with placeholders; `declares` are the config entries by
    which its trainer says that it is a DoRA. `plain`: it may be none.
    """

    name: str
    title: str
    weights: str
    files: tuple[str, ...]
    config: str | None = None
    prefixes: tuple[str, ...] = ("",)
    base_model: str | None = None
    linear: Layout
    embedding: Layout | None = None
    scales: tuple[Scale, ...] = ()
    magnitude_is: MagnitudeKind = MagnitudeKind.NORM
    bias_rule: BiasRule = BiasRule.KEEP
    plain: bool = False
    magnitude_only: bool = False
    declares: tuple[Condition, ...] = ()
    replaced: tuple[NamePattern, ...] = ()
    ignore: tuple[NamePattern, ...] = ()
    renames: tuple[tuple[NamePattern, NamePattern], ...] = ()
    rows: tuple[Rows, ...] = ()
    detect: Condition | None = None
    unless: Condition | None = None
    refusals: tuple[Refusal, ...] = ()
    document: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Embeddings first: they are told by name, and all else is linear."""
        return (self.linear,) if self.embedding is None else (self.embedding, self.linear)

    @property
    def saves_scaling(self) -> bool:
        """Whether the files say what the update is multiplied with."""
        return bool(self.scales) or self.linear.alpha is not None
