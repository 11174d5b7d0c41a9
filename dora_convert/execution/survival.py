"""What a quantised result keeps of every module's update, measured while it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_convert import quant
from dora_convert.core.plan import Quantise
from dora_convert.core.reports import Survival, SurvivalFigures
from dora_convert.execution.lanes import BLOCK_BYTES
from dora_convert.execution.units import Unit
from dora_convert.maths.compare import relative
from dora_convert.maths.survival import BlockSums, SurvivalSums, changed_codes, survival_sums

__all__ = ["Meter", "survival"]

# Rows of a stripe and how many stripes there are for each that is measured: to measure one takes as
# long as to write three. Of a module of 4M weights half a million are seen, and what is kept is
# known to a thousandth of the noise.
_STRIPE_BYTES = BLOCK_BYTES
_EVERY = 8
# Elements whose sums are computed at once: a stripe of 16-bit floats. Tall tiles may have more.
_AT_ONCE = _STRIPE_BYTES // 2


class Meter:
    """Sums over one unit, by the path of the module that each row belongs to.

    Which rows are measured, the plan alone says: the figures do not depend on the size of blocks.
    """

    def __init__(self, unit: Unit, statistic: Tensor | None, device: torch.device) -> None:
        assert isinstance(unit.job.op, Quantise)
        self._op = unit.job.op
        self._first = unit.start
        self._scheme = scheme = quant.writable(self._op.scheme)
        self._statistic = statistic
        # Where they are known only once all is written, rows are decoded as a weight of their own.
        self._constants: Mapping[str, Tensor] | None = None
        if scheme.surveyed is None:
            constants = scheme.constants(self._op.weight, statistic)
            self._constants = quant.placed(scheme, constants, device)
        self._sums: list[tuple[str, BlockSums]] = []
        multiple = self._scheme.row_multiple(self._op.weight)
        rows = _STRIPE_BYTES // max(self._op.base.spec.row_bytes, 1)
        self._stripe = max(1, rows // multiple) * multiple

    def sums(self) -> dict[str, SurvivalSums]:
        """What was measured, by path; waits for the device."""
        found: dict[str, SurvivalSums] = {}
        for path, sums in self._sums:
            found.setdefault(path, SurvivalSums()).add(sums.settled())
        return found

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Which of the rows `start:stop` of a block to measure."""
        found: list[tuple[int, int]] = []
        for index in range((start - self._first) // self._stripe, self._index_after(stop)):
            a = self._first + index * self._stripe
            b = a + self._stripe
            if self._wants(index, a, b):
                a, b = max(a, start), min(b, stop)
                if found and found[-1][1] == a:
                    a = found.pop()[0]
                found.append((a, b))
        return found

    def add(
        self,
        start: int,
        base: Tensor,
        merged: Tensor,
        parts: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> None:
        """Rows of W and of W', and what they were stored as; `own` are scales that W had."""
        weight, scheme = self._op.weight, self._scheme
        stop, shape = start + len(merged), (len(merged), weight.columns)
        if self._constants is None:
            _, stored = quant.rounded_alone(scheme, weight, merged.float())
        else:
            stored = quant.decoded_block(scheme, weight, start, stop, parts, self._constants)
        # As the merged rows are: with one rounding, and under the same scale of the whole tensor.
        plain_parts, plain = quant.rounded_alone(scheme, weight, base.float(), self._statistic, own)
        role = next(iter(weight.parts))  # the codes come first
        changed = changed_codes(parts[role], plain_parts[role], shape)
        few = max(1, _AT_ONCE // weight.columns)
        for piece in self._op.pieces:
            a, b = max(start, piece.start), min(stop, piece.stop)
            for first in range(a, b, few):
                rows = slice(first - start, min(first + few, b) - start)
                sums = survival_sums(
                    base[rows],
                    merged[rows],
                    stored[rows].to(base),
                    plain[rows].to(base),
                    changed[rows],
                )
                self._sums.append((piece.module.path, sums))

    def _index_after(self, stop: int) -> int:
        return -(-(stop - self._first) // self._stripe)

    def _wants(self, index: int, start: int, stop: int) -> bool:
        pieces = [p for p in self._op.pieces if p.start < stop and start < p.stop]
        # Never without a part of each module.
        return bool(pieces) and (index % _EVERY == 0 or any(p.start >= start for p in pieces))


def survival(scheme: str, parts: Sequence[Mapping[str, SurvivalSums]]) -> Survival | None:
    """The figures of all modules, and of them together; None where nothing was measured."""
    modules: dict[str, SurvivalSums] = {}
    total = SurvivalSums()
    for part in parts:
        for path, sums in part.items():
            modules.setdefault(path, SurvivalSums()).add(sums)
            total.add(sums)
    if not modules:
        return None
    return Survival(
        scheme, _figures(total), {path: _figures(modules[path]) for path in sorted(modules)}
    )


def _figures(sums: SurvivalSums) -> SurvivalFigures:
    return SurvivalFigures(
        # Of no update nothing is lost.
        kept=sums.kept / sums.effect if sums.effect else 1.0,
        noise=relative(sums.noise, sums.effect),
        plain_noise=relative(sums.plain, sums.effect),
        error=relative(sums.noise, sums.merged),
        plain_error=relative(sums.plain, sums.base),
        codes_changed=sums.changed / sums.elements,
    )
