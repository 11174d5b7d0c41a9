"""An adapter in canonical layout, whatever trainer wrote it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dora_convert.core.deltas import Delta, LowRank
from dora_convert.core.tensors import TensorRef

__all__ = [
    "Adapter",
    "BiasRule",
    "DoraModule",
    "LayerKind",
    "MagnitudeAxis",
    "MagnitudeKind",
    "RowOrder",
    "TokenRows",
]


class MagnitudeAxis(enum.Enum):
    """Which axis of the stored `[out, in]` weight a magnitude has an entry for.

    OUT: one per output row, the norm runs over the inputs. IN: one per input column, the norm
    runs over the outputs.
    """

    OUT = "out"
    IN = "in"

    @property
    def flipped(self) -> MagnitudeAxis:
        """The same axis seen on the transposed weight."""
        return MagnitudeAxis.IN if self is MagnitudeAxis.OUT else MagnitudeAxis.OUT


class LayerKind(enum.Enum):
    """What kind of layer a module is; formats name and shape its factors accordingly."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"


class MagnitudeKind(enum.Enum):
    """What the values of a magnitude are.

    NORM: the length `m` that a row gets. FACTOR: `m / ||V||` already, which `V` is multiplied with.
    """

    NORM = "norm"
    FACTOR = "factor"


class BiasRule(enum.Enum):
    """What the trainer's forward did with the base's bias.

    KEEP: added it as it is. SCALED: multiplied the whole output, bias included, with `m / ||V||`.
    NONE: there was none, so that either is true.
    """

    KEEP = "keep"
    SCALED = "scaled"
    NONE = "none"


class RowOrder(enum.Enum):
    """The order of a tensor's rows against those of the weight on disk, per attention head.

    A rotary embedding pairs entry `i` of a head with `i + d/2` (the order of transformers), or
    `2i` with `2i + 1`. INTERLEAVED: the rows are in the second order, the weight in the first.
    HALVED: as if rows in the first order had been taken for the second and reordered once more.
    """

    SAME = "same"
    INTERLEAVED = "interleaved"
    HALVED = "halved"


@dataclass(frozen=True, slots=True)
class DoraModule:
    """One adapted weight: `m * V / ||V||` with `V = W + scaling * delta` (arXiv 2402.09353).

    `delta` is None where only the magnitude was trained; `magnitude` is None for a plain LoRA
    module, `W' = V`. `weight` is the trainer's own copy of W, where the file carries one.
    `up_order` and `magnitude_order` are the row orders of those two, which need the base's number
    of heads to be undone (`planning.settle`).
    """

    path: str
    delta: Delta | None
    magnitude: TensorRef | None  # [out] or [in], by `axis`
    axis: MagnitudeAxis
    scaling: float
    weight: TensorRef | None = None
    kind: LayerKind = LayerKind.LINEAR
    magnitude_is: MagnitudeKind = MagnitudeKind.NORM
    bias_rule: BiasRule = BiasRule.KEEP
    up_order: RowOrder = RowOrder.SAME
    magnitude_order: RowOrder = RowOrder.SAME

    def transposed(self) -> DoraModule:
        """The same module for a weight that is stored `[in, out]`, as `weight` already is."""
        factors = self.factors
        assert factors is not None or self.delta is None, self.path
        delta = factors.transposed() if factors is not None else None
        return replace(self, delta=delta, axis=self.axis.flipped)

    @property
    def factors(self) -> LowRank | None:
        """The update as `up @ down`; None where there is none, or it is not stored so."""
        return self.delta if isinstance(self.delta, LowRank) else None


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding that were trained whole and replace the base's (`[n, dim]`).

    `weight` is the trainer's own copy of the whole embedding, where the file carries one: its
    vocabulary may have been resized.
    """

    indices: tuple[int, ...]
    rows: TensorRef
    weight: TensorRef | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """All that an adapter changes, each tensor of its files accounted for.

    `modules` and `token_rows` are keyed by module path, `replaced` (tensors trained whole) by
    tensor path. `task` is the head that the trainer put on (PEFT's task_type). `keeps_ties`:
    replaced input and output embeddings were trained as one tensor. `meets_transposed`: the
    trainer's word that some weight of the base is stored `[in, out]`. `is_axis_open`: neither the
    format nor any shape says what the magnitudes belong to, and the modules' axis is provisional
    until the base's norms decide. `is_scaling_open`: the trainer does not save what the update is
    multiplied with; the modules' scaling is 1 until the user says it.
    `is_place_open`: paths are as the trainer of an image model spells them, and what they are
    called in a base is found there (`planning.components`).
    """

    format: str
    modules: Mapping[str, DoraModule]
    replaced: Mapping[str, TensorRef] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    base_model: str | None = None
    task: str | None = None
    keeps_ties: bool = False
    meets_transposed: bool = False
    is_axis_open: bool = False
    is_scaling_open: bool = False
    is_place_open: bool = False
    notes: tuple[str, ...] = ()
