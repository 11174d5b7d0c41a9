"""Which tensor of a file is what, by the patterns of a description."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dora_convert.core.spec.names import MODULE, NamePattern
from dora_convert.core.spec.values import Layout, Part, Spec
from dora_convert.core.tensors import TensorRef

__all__ = ["Module", "Placed", "is_any", "layout_of", "place", "renamed", "without_prefix"]

_MAKE_A_MODULE = ("down", "up", "magnitude")


@dataclass(slots=True)
class Module:
    """The tensors of one module by role, and the path that they have in the file."""

    layout: Layout
    stored: str
    tensors: dict[str, TensorRef] = field(default_factory=dict)


@dataclass(slots=True)
class Placed:
    """All tensors of a file: modules by path, whole tensors by path."""

    modules: dict[str, Module] = field(default_factory=dict)
    replaced: dict[str, TensorRef] = field(default_factory=dict)


def place(spec: Spec, tensors: Mapping[str, TensorRef], problems: list[str]) -> Placed:
    """Every tensor gets its place, or becomes a problem."""
    placed = Placed()
    others: dict[str, TensorRef] = {}
    for stored, ref in tensors.items():
        name = without_prefix(stored, spec)
        if is_any(name, spec.ignore):
            continue
        # Those that make a module first: a weight or a bias is only one of an adapted module.
        if not _take(spec, placed, name, ref, problems, makes=True):
            others[name] = ref
    for name, ref in others.items():
        if _take(spec, placed, name, ref, problems, makes=False):
            continue
        if is_any(name, spec.replaced):
            _add(placed.replaced, _renamed_tensor(name, spec), ref, problems)
        else:
            problems.append(f"{ref.stored.name} {list(ref.stored.shape)} is not understood")
    return placed


def renamed(path: str, spec: Spec) -> str:
    """The module's name in the model, by the first rename that fits."""
    for old, new in spec.renames:
        values = old.match(path)
        if values is not None:
            return new.fill(values) or path
    return path


def layout_of(path: str, spec: Spec) -> Layout:
    """What kind of module it is, by its name in the model."""
    embedding = spec.embedding
    return embedding if embedding is not None and is_any(path, embedding.modules) else spec.linear


def is_any(name: str, patterns: Iterable[NamePattern]) -> bool:
    """Whether one of the patterns fits the whole name."""
    return any(pattern.match(name) is not None for pattern in patterns)


def without_prefix(name: str, spec: Spec) -> str:
    """The stored name less the first prefix that it begins with."""
    prefix = next((p for p in spec.prefixes if p and name.startswith(p)), "")
    return name.removeprefix(prefix)


def _take(
    spec: Spec,
    placed: Placed,
    name: str,
    ref: TensorRef,
    problems: list[str],
    *,
    makes: bool,
) -> bool:
    for layout in spec.layouts:
        for role, part in layout.parts():
            if (role in _MAKE_A_MODULE) is not makes:
                continue
            stored = _module_of(name, part)
            if stored is None:
                continue
            path = renamed(stored, spec)
            if layout_of(path, spec) is not layout or not (makes or path in placed.modules):
                continue
            if role == "bias":
                _add(placed.replaced, f"{path}.bias", ref, problems)
            else:
                module = placed.modules.setdefault(path, Module(layout, stored))
                _add(module.tensors, role, ref, problems)
            return True
    return False


def _module_of(name: str, part: Part) -> str | None:
    values = part.name.match(name)
    return None if values is None else values[MODULE]


def _renamed_tensor(name: str, spec: Spec) -> str:
    path, dot, leaf = name.rpartition(".")
    return f"{renamed(path, spec)}{dot}{leaf}"


def _add(held: dict[str, TensorRef], key: str, ref: TensorRef, problems: list[str]) -> None:
    other = held.setdefault(key, ref)
    if other is not ref:
        problems.append(f"{other.stored.name} and {ref.stored.name} are the same tensor ({key})")
