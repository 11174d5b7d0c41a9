"""A description as an adapter format."""

from __future__ import annotations

from dora_convert.core.adapter import Adapter, MagnitudeAxis
from dora_convert.core.bundle import Bundle
from dora_convert.core.spec.configs import holds
from dora_convert.core.spec.reading import read
from dora_convert.core.spec.values import Condition, Spec
from dora_convert.core.spec.writing import write

__all__ = ["SpecFormat"]


class SpecFormat:
    """Reads and writes as `spec` says; an `AdapterFormat`."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.title = spec.title
        self.weights = spec.weights

    def detect(self, bundle: Bundle) -> bool:
        """Whether the tensors and the config are such; by default, whether all parts are there."""
        spec = self.spec
        layout = spec.linear
        parts = Condition((layout.down.name, layout.up.name, layout.magnitude.name))
        if spec.unless is not None and holds(spec.unless, spec, bundle):
            return False
        return holds(spec.detect or parts, spec, bundle)

    def read(self, bundle: Bundle, *, axis: MagnitudeAxis | None = None) -> Adapter:
        """See `AdapterFormat.read`."""
        return read(self.spec, bundle, axis)

    def write(self, adapter: Adapter) -> Bundle:
        """See `AdapterFormat.write`."""
        return write(self.spec, adapter)
