"""What a quantised result keeps of every module's update, measured while it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dora_convert import quant
from dora_convert.core.plan import Quantise
from dora_convert.core.reports import Survival, SurvivalFigures
from dora_convert.maths.compare import relative
from dora_convert.maths.survival import SurvivalSums, changed_codes, survival_sums

__all__ = ["Meter", "survival"]


# One block in so many is measured: it takes as long as to write three. Of a module of 4M weights
# half a million are seen, and what is kept is known to a thousandth of the noise.
_EVERY = 8


class Meter:
    """Sums over blocks of one unit, by the path of the module that each row belongs to."""

    def __init__(
        self, op: Quantise, constants: Mapping[str, Tensor], statistic: Tensor | None
    ) -> None:
        self.sums: dict[str, SurvivalSums] = {}
        self._op = op
        self._scheme = quant.writable(op.scheme)
        self._constants = constants
        self._statistic = statistic

    def wants(self, index: int, start: int, stop: int) -> bool:
        """Whether to measure the unit's block of this index, rows `start:stop`."""
        pieces = [p for p in self._op.pieces if p.start < stop and start < p.stop]
        # Never without a part of each module.
        return bool(pieces) and (index % _EVERY == 0 or any(p.start >= start for p in pieces))

    def add(
        self,
        start: int,
        base: Tensor,
        merged: Tensor,
        parts: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> None:
        """A block of W and of W', and what it was stored as; `own` are scales that W had."""
        weight, scheme = self._op.weight, self._scheme
        stop, shape = start + len(merged), (len(merged), weight.columns)
        stored = quant.decoded_block(scheme, weight, start, stop, parts, self._constants)
        # As the merged rows are: with one rounding, and under the same scale of the whole tensor.
        plain_parts, plain = quant.rounded_alone(scheme, weight, base.float(), self._statistic, own)
        role = next(iter(weight.parts))  # the codes come first
        changed = changed_codes(parts[role], plain_parts[role], shape)
        for piece in self._op.pieces:
            a, b = max(start, piece.start), min(stop, piece.stop)
            if a < b:
                rows = slice(a - start, b - start)
                sums = survival_sums(
                    base[rows],
                    merged[rows],
                    stored[rows].to(base),
                    plain[rows].to(base),
                    changed[rows],
                )
                self.sums.setdefault(piece.module.path, SurvivalSums()).add(sums)


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
