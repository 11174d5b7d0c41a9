"""A trainer's config, asked by dotted keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dora_convert.core.bundle import Bundle, Json
from dora_convert.core.fields import Fields
from dora_convert.core.spec.placing import without_prefix
from dora_convert.core.spec.values import Condition, Scale, Spec

__all__ = ["Scaling", "entry", "holds", "open_fields", "resolved", "scaling"]


class Scaling:
    """What the update of a module is multiplied with, by its rank."""

    def __init__(
        self, value: float, alpha: float | None, rank: float | None, *, root: bool
    ) -> None:
        self._value = value
        self._alpha = alpha
        self._root = root
        self.rank = rank

    def of(self, rank: int) -> float:
        """The scaling of a module whose tensors have this rank."""
        if self._alpha is None:
            return self._value
        divisor = self.rank if self.rank is not None else float(rank)
        quotient = self._alpha / (math.sqrt(divisor) if self._root else divisor)
        return quotient if self._value == 1.0 else self._value * quotient


def entry(document: Json, key: str) -> Any:
    """The value at a dotted key, or None; a key that has dots itself comes first."""
    if key in document:
        return document[key]
    value: Any = document
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def holds(condition: Condition, spec: Spec, bundle: Bundle) -> bool:
    """Whether the files fulfil all of it."""
    document = _document(spec, bundle)
    return all(
        any(pattern.match(without_prefix(name, spec)) is not None for name in bundle.tensors)
        for pattern in condition.names
    ) and all(_same(entry(document, key), value) for key, value in condition.config.items())


def open_fields(spec: Spec, bundle: Bundle, problems: list[str]) -> Fields:
    """Typed access by dotted keys to all entries that the layout speaks of."""
    keys = {key for scale in spec.scales for key in (*scale.keys, scale.rslora) if key}
    if spec.base_model is not None:
        keys.add(spec.base_model)
    document = _document(spec, bundle)
    file = spec.config or "config"
    return Fields({key: entry(document, key) for key in keys}, file, problems)


def scaling(spec: Spec, bundle: Bundle, fields: Fields, problems: list[str]) -> Scaling | None:
    """By the first rule whose entries are all there; None, and a problem, where there is none."""
    document = _document(spec, bundle)
    for scale in spec.scales:
        if all(entry(document, key) is not None for key in scale.keys):
            return resolved(scale, fields)
    wanted = " or ".join(" and ".join(repr(key) for key in scale.keys) for scale in spec.scales)
    if spec.config not in bundle.documents:
        problems.append(f"{spec.config} is missing: it holds the scaling ({wanted})")
    else:
        problems.append(f"{spec.config}: {wanted} is missing: it holds the scaling")
    return None


def resolved(scale: Scale, fields: Fields) -> Scaling:
    """The rule with its numbers, those of the config among them."""
    value, alpha = (
        fields.number(item, 1.0) if isinstance(item, str) else item
        for item in (scale.value, scale.alpha)
    )
    rank = fields.count(scale.rank, 1) if isinstance(scale.rank, str) else scale.rank
    root = scale.rslora is not None and fields.flag(scale.rslora)
    return Scaling(1.0 if value is None else value, alpha, rank, root=root)


def _document(spec: Spec, bundle: Bundle) -> Json:
    return bundle.documents.get(spec.config, {}) if spec.config is not None else {}


def _same(found: object, wanted: object) -> bool:
    # 1 == True in Python, but not in a config.
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)
