"""How far an adapter moved a weight, and how much of that a storage type keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from dora_convert.maths.dora import RowFaults

__all__ = [
    "ModuleSums",
    "block_sums",
    "counted",
    "element_sums",
    "products",
    "relative",
    "vector_sums",
]


@dataclass(slots=True)
class ModuleSums:
    """Sums over rows, from which a module's figures follow; blocks add up.

    With W the base, V the direction, W' the merged weight, T = W' - W the effective update and Q
    rounding to the storage type; per row `n = ||V||`, `w = ||W||`.
    """

    rows: int = 0
    faults: RowFaults = field(default_factory=RowFaults)  # rows that have no merged value
    base: float = 0.0  # sum of W^2
    update: float = 0.0  # sum of (V - W)^2, the low-rank update
    effect: float = 0.0  # sum of T^2
    noise: float = 0.0  # sum of (Q(W') - W')^2
    kept: float = 0.0  # sum of (Q(W') - W) * T
    magnitude_shift: float = 0.0  # sum over rows of |m - w|
    magnitude_base: float = 0.0  # sum over rows of w
    direction_shift: float = 0.0  # sum over rows of 1 - cos(V, W)
    ratio: float = 0.0  # sum over rows of log(m / w)
    ratio_square: float = 0.0

    def add(self, other: ModuleSums) -> None:
        """Accumulate another block."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def block_sums(
    base: Tensor, direction: Tensor, magnitude: Tensor | None, dtype: torch.dtype
) -> ModuleSums:
    """One block of whole rows `[n, length]`, each with its magnitude `[n]`, in float32 or float64.

    `dtype` is the storage type whose rounding is measured. Rows of norm 0 do not count.
    """
    w = torch.linalg.vector_norm(base, dim=1)
    n = torch.linalg.vector_norm(direction, dim=1)
    m = n if magnitude is None else magnitude
    sums = vector_sums(w, n, (base * direction).sum(dim=1), m)
    used = counted(w, n)
    if not bool(used.all()):
        base, direction, n, m = base[used], direction[used], n[used], m[used]
    sums.add(element_sums(base, direction, (m / n).unsqueeze(1), dtype))
    return sums


def products(base: Tensor, direction: Tensor) -> Tensor:
    """`W . W`, `V . V` and `W . V` of every column, float64 `[3, in]`; row blocks add up."""
    pairs = ((base, base), (direction, direction), (base, direction))
    return torch.stack([(x * y).sum(dim=0).double() for x, y in pairs])


def counted(w: Tensor, n: Tensor) -> Tensor:
    """Which vectors of these norms, before and after the update, have figures."""
    return (w > 0) & (n > 0) & torch.isfinite(w) & torch.isfinite(n)


def vector_sums(w: Tensor, n: Tensor, dot: Tensor, magnitude: Tensor) -> ModuleSums:
    """What follows from every vector's `||W||`, `||V||`, `W . V` and magnitude, each `[n]`."""
    faults = RowFaults(
        zero=int(((n == 0) & (magnitude != 0)).sum()), nonfinite=int((~torch.isfinite(n)).sum())
    )
    used = counted(w, n)
    w, n, dot, m = w[used], n[used], dot[used], magnitude[used]
    log_ratio = torch.log(m.abs() / w)
    return ModuleSums(
        rows=len(w),
        faults=faults,
        magnitude_shift=_total((m - w).abs()),
        magnitude_base=_total(w),
        direction_shift=_total((1 - dot / (w * n)).clamp_min(0)),
        ratio=_total(log_ratio),
        ratio_square=_total(log_ratio.square()),
    )


def element_sums(base: Tensor, direction: Tensor, factor: Tensor, dtype: torch.dtype) -> ModuleSums:
    """What is summed over the elements of a block; `factor` is `m / ||V||`, `[n, 1]` or `[in]`."""
    merged = direction * factor
    effect = merged - base
    rounded = merged.to(dtype).to(merged.dtype)
    return ModuleSums(
        base=_square(base),
        update=_square(direction - base),
        effect=_square(effect),
        noise=_square(rounded - merged),
        kept=float(((rounded - base) * effect).sum(dtype=torch.float64)),
    )


def relative(part: float, whole: float) -> float:
    """The ratio of two norms, from their squares; 0 of nothing."""
    return math.sqrt(part / whole) if whole else 0.0


def _square(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _total(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))
