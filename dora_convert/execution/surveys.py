"""What blocks say of a whole tensor, kept while that is written: for one tensor, not for all."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from dora_convert import quant
from dora_convert.core.plan import Quantise
from dora_convert.execution.units import Unit

__all__ = ["Surveys"]


class Surveys:
    """Of schemes whose blocks need no number of the whole, but whose constants do.

    `work` are the units to be written. Several threads use it.
    """

    def __init__(self, work: Iterable[Unit]) -> None:
        self._left = Counter(u.job.output.name for u in work if isinstance(u.job.op, Quantise))
        self._seen: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def of(self, unit: Unit) -> Tensor | None:
        """Memory for the numbers of all rows, in their order; None where none are asked for.

        It is taken at once: small pieces between the temporaries of blocks would keep the C
        library from using the memory of these again.
        """
        op, name = unit.job.op, unit.job.output.name
        assert isinstance(op, Quantise)
        role = quant.writable(op.scheme).surveyed
        if role is None:
            return None
        with self._lock:
            if name not in self._seen:
                self._seen[name] = torch.empty(op.weight.parts[role].numel)
            return self._seen[name]

    def done(self, unit: Unit) -> bool:
        """One unit less; whether it was the tensor's last."""
        name = unit.job.output.name
        with self._lock:
            self._left[name] -= 1
            last = self._left[name] == 0
            if last:
                self._seen.pop(name, None)
            return last
