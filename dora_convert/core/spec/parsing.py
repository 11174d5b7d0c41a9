"""The text of a description to a `Spec`: strict, and everything that is wrong at once."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from dora_convert.core.adapter import BiasRule, LayerKind, MagnitudeKind, RowOrder
from dora_convert.core.spec.lines import lines_of_keys
from dora_convert.core.spec.names import MODULE, NamePattern
from dora_convert.core.spec.tables import Faults, Table
from dora_convert.core.spec.values import (
    Condition,
    Dim,
    Layout,
    Part,
    Refusal,
    Rows,
    Scale,
    Spec,
)
from dora_convert.errors import InputError

__all__ = ["parse"]

_KEYS: Final = (
    *("title", "weights", "files", "config", "prefix", "base_model", "scale", "bias", "plain"),
    *("magnitude_only", "declares_dora", "tensors", "embedding", "replaced", "ignore", "rename"),
    *("rows", "detect", "refuse", "write", "note"),
)
_ROLES: Final = ("down", "up", "magnitude", "weight", "bias", "alpha")
_SHAPES: Final[Mapping[str, tuple[tuple[Dim, ...], ...]]] = {
    "down": (("rank", "in"), ("in", "rank")),
    "up": (("out", "rank"), ("rank", "out")),
    "weight": (("out", "in"), ("in", "out")),
    "magnitude": (
        *(("out",), ("out", 1), (1, "out")),
        *(("in",), ("in", 1), (1, "in")),
    ),
}
_ENDINGS: Final = {"weights": (".safetensors", ".bin", ".pt", ".pth"), "config": (".json",)}
_FILLED: Final = ("rank", "scale", "alpha", "base_model", "modules", "leaves")
_PLAIN = (str, int, float, bool)
# Dots of one key: the standard parser takes the square of their number in time.
_MOST = 50
_STRING = re.compile(r'"(?:\\.|[^"\\])*"|\'[^\']*\'')
_EMPTY = NamePattern.parse(f"{{{MODULE}}}")


def parse(text: str, *, name: str, file: str) -> Spec:
    """The layout that `text` describes, under this name.

    Raises InputError with the line and key of everything that is wrong.
    """
    deep = InputError("the description is nested too deeply", where=file)
    if any(_STRING.sub("", line).partition("#")[0].count(".") > _MOST for line in text.split("\n")):
        raise deep
    try:
        data = tomllib.loads(text)
    except RecursionError as error:
        raise deep from error
    except ValueError as error:
        raise InputError(f"the description is not valid TOML: {error}", where=file) from error
    faults = Faults(lines_of_keys(text))
    try:
        spec = _spec(Table(data, (), faults), name)
    except RecursionError as error:
        raise deep from error
    problems = faults.messages()
    if problems:
        raise InputError(
            "the description of the format is wrong",
            where=file,
            problems=problems,
            hint="dora-convert formats --example-spec prints a commented one.",
        )
    return spec


def _spec(top: Table, name: str) -> Spec:
    top.only(_KEYS)
    linear = _linear(top)
    detect = top.table("detect")
    embedding = _embedding(top)
    weights = top.text("weights", "adapter_model.safetensors")
    spec = Spec(
        name=name,
        title=top.text("title", name),
        weights=weights,
        files=_files(top, weights),
        config=top.text("config") or None,
        prefixes=top.texts("prefix") or ("",),
        base_model=top.text("base_model") or None,
        linear=linear,
        embedding=embedding,
        scales=_scales(top),
        magnitude_is=_magnitude_kind(top),
        bias_rule=BiasRule(top.choice("bias", "keep", "scaled")),
        plain=top.flag("plain"),
        magnitude_only=top.flag("magnitude_only"),
        declares=tuple(_declared(table) for table in top.tables("declares_dora")),
        replaced=top.patterns("replaced"),
        ignore=top.patterns("ignore"),
        renames=_renames(top),
        rows=tuple(_rows(table) for table in top.tables("rows")),
        detect=_condition(detect, "unless"),
        unless=_condition(detect.table("unless")) if detect is not None else None,
        refusals=tuple(_refusal(table) for table in top.tables("refuse")),
        document=_document(top),
        notes=tuple(note for note in top.texts("note") if note),
    )
    _contradictions(top, spec)
    return spec


def _files(top: Table, weights: str) -> tuple[str, ...]:
    files = top.texts("files") or (weights,)
    for file in files:
        if not file or "/" in file or "\\" in file:
            top.reject("files", f"({file!r:.60}) must name files directly in the adapter's folder")
    for key, endings in _ENDINGS.items():
        name = top.text(key)
        if name and (set(name) & set("/\\*?[") or not name.endswith(endings)):
            top.reject(
                key, f"({name!r:.60}) must be the plain name of a {' or '.join(endings)} file"
            )
    return files


def _linear(top: Table) -> Layout:
    table = top.table("tensors")
    if table is None:
        if "tensors" not in top:
            top.reject("tensors", "is missing: it names the tensors of a module")
        table = Table({}, (), Faults({}))
    table.only(_ROLES)
    return _layout(table, LayerKind.LINEAR, ())


def _embedding(top: Table) -> Layout | None:
    table = top.table("embedding")
    if table is None:
        return None
    table.only(("modules", *_ROLES))
    modules = table.patterns("modules")
    if not modules:
        table.reject(None, "has no modules: the patterns of the paths that are embeddings")
    return _layout(table, LayerKind.EMBEDDING, modules)


def _layout(table: Table, kind: LayerKind, modules: tuple[NamePattern, ...]) -> Layout:
    parts = {role: _part(table, role) for role in _ROLES}
    for role in ("down", "up", "magnitude"):
        if role not in table:
            table.reject(None, f"has no {role!r}: the name of that tensor, with {{module}} in it")
    empty = Part(_EMPTY)
    return Layout(
        kind=kind,
        modules=modules,
        down=parts["down"] or empty,
        up=parts["up"] or empty,
        magnitude=parts["magnitude"] or empty,
        weight=parts["weight"],
        bias=parts["bias"],
        alpha=parts["alpha"],
    )


def _part(table: Table, role: str) -> Part | None:
    value = table.raw(role)
    shapes = _SHAPES.get(role, ())
    usual = shapes[0] if shapes and role != "magnitude" else ()
    if not isinstance(value, dict):
        pattern = table.pattern(role, needs=MODULE)
        return None if pattern is None else Part(pattern, usual)
    inner = Table(value, (*table.path, role), table.faults)
    inner.only(("name", *(("shape",) if shapes else ()), *(("values",) * (role == "magnitude"))))
    if "name" not in inner:
        inner.reject(None, "has no name")
    pattern = inner.pattern("name", needs=MODULE)
    shape = _shape(inner, "shape", shapes) if "shape" in inner else usual
    return None if pattern is None else Part(pattern, shape)


def _shape(table: Table, key: str, shapes: tuple[tuple[Dim, ...], ...]) -> tuple[Dim, ...]:
    value = table.raw(key)
    if isinstance(value, list) and tuple(value) in shapes and True not in map(_is_bool, value):
        return tuple(value)
    known = " or ".join(_shown(shape) for shape in shapes)
    table.reject(key, f"must be {known}, not {value!r:.60}")
    return ()


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _shown(shape: tuple[Dim, ...]) -> str:
    return "[" + ", ".join(f'"{dim}"' if isinstance(dim, str) else str(dim) for dim in shape) + "]"


def _magnitude_kind(top: Table) -> MagnitudeKind:
    """What the magnitude's values are; the same for embeddings, for it is one trainer."""
    kinds = set()
    for key in ("tensors", "embedding"):
        table = top.table(key) if isinstance(top.raw(key), dict) else None
        inner = (
            table.table("magnitude") if table and isinstance(table.raw("magnitude"), dict) else None
        )
        if inner is not None:
            kinds.add(MagnitudeKind(inner.choice("values", "norm", "factor")))
        elif table is not None:
            kinds.add(MagnitudeKind.NORM)
    if len(kinds) > 1:
        top.reject("embedding", "has magnitudes of other values than those of tensors")
    return kinds.pop() if kinds else MagnitudeKind.NORM


def _scales(top: Table) -> tuple[Scale, ...]:
    value = top.raw("scale")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not values:
        top.reject("scale", "is an empty list: leave it out if the trainer does not save it")
    scales = []
    for item in values:
        if isinstance(item, dict):
            scales.append(_scale(Table(item, (*top.path, "scale"), top.faults)))
            continue
        number = Table({"scale": item}, top.path, top.faults).key_or_number("scale")
        if number is not None:
            scales.append(Scale(value=number))
    return tuple(scales)


def _scale(table: Table) -> Scale:
    table.only(("value", "alpha", "rank", "rslora"))
    value, alpha, rank = (table.key_or_number(key) for key in ("value", "alpha", "rank"))
    if "value" not in table and "alpha" not in table:
        table.reject(None, "needs a value or an alpha")
    for key in ("rank", "rslora"):
        if key in table and "alpha" not in table:
            table.reject(key, "has no meaning without an alpha")
    if isinstance(rank, float) and rank <= 0:
        table.reject("rank", "must be more than 0")
    return Scale(
        value=1.0 if value is None else value,
        alpha=alpha,
        rank=rank,
        rslora=table.text("rslora") or None,
    )


def _renames(top: Table) -> tuple[tuple[NamePattern, NamePattern], ...]:
    table = top.table("rename")
    found = []
    for old in table.names() if table is not None else ():
        assert table is not None
        source = table.parsed(old, old)
        target = table.pattern(old)
        if source is None or target is None:
            continue
        unknown = target.required - source.required
        if unknown:
            names = ", ".join(f"{{{name}}}" for name in sorted(unknown))
            table.reject(old, f"is renamed to a name with {names}, which it does not have")
        elif target.is_optional:
            table.reject(old, "is renamed to a name with optional parts")
        else:
            found.append((source, target))
    return tuple(found)


def _rows(table: Table) -> Rows:
    table.only(("modules", "up", "magnitude"))
    orders = (RowOrder.SAME.value, RowOrder.INTERLEAVED.value)
    modules = table.patterns("modules")
    if not modules:
        table.reject(None, "has no modules")
    up, magnitude = (RowOrder(table.choice(key, *orders)) for key in ("up", "magnitude"))
    if magnitude is RowOrder.SAME:
        # Which of two orders a base wants is told from the magnitudes.
        table.reject(None, "must have the magnitude interleaved, alone or together with up")
    return Rows(modules, up, magnitude)


def _condition(table: Table | None, *others: str) -> Condition | None:
    if table is None:
        return None
    table.only(("names", "config", *others))
    entries = table.table("config")
    names = table.patterns("names")
    config = _entries(entries) if entries is not None else MappingProxyType({})
    if not names and not config:
        table.reject(None, "has neither names nor config entries")
    return Condition(names, config)


def _declared(table: Table) -> Condition:
    if not table.names():
        table.reject(None, "is an empty table")
    return Condition(config=_entries(table))


def _entries(table: Table) -> Mapping[str, Any]:
    """Dotted keys to their values; only what JSON holds as well can be equal to anything."""
    flat: dict[str, Any] = {}
    for key in table.names():
        value = table.raw(key)
        inner = table.table(key) if isinstance(value, dict) else None
        if inner is not None:
            flat |= {f"{key}.{rest}": held for rest, held in _entries(inner).items()}
        elif isinstance(value, str | int | float | bool):
            flat[key] = value
        else:
            table.reject(key, f"must be text, a number or a flag, not {value!r:.60}")
    return MappingProxyType(flat)


def _refusal(table: Table) -> Refusal:
    table.only(("why", "names", "config", "magnitude"))
    if "why" not in table:
        table.reject(None, "has no 'why'")
    magnitude = _shape(table, "magnitude", _SHAPES["magnitude"]) if "magnitude" in table else ()
    entries = table.table("config")
    condition = Condition(
        table.patterns("names"), _entries(entries) if entries is not None else MappingProxyType({})
    )
    if not (condition.names or condition.config or "magnitude" in table):
        table.reject(None, "has neither names, config entries nor the shape of a magnitude")
    return Refusal(table.text("why"), condition, magnitude)


def _document(top: Table) -> Mapping[str, Any] | None:
    table = top.table("write")
    if table is None:
        return None
    _check_template(table)
    value = top.raw("write")
    assert isinstance(value, dict)
    return MappingProxyType(value)


def _check_template(table: Table) -> None:
    for key in table.names():
        value = table.raw(key)
        inner = table.table(key) if isinstance(value, dict) else None
        if inner is not None:
            _check_template(inner)
        elif isinstance(value, str) and value.startswith("{"):
            if value.removeprefix("{").removesuffix("}") not in _FILLED:
                known = ", ".join(f"{{{name}}}" for name in _FILLED)
                table.reject(key, f"has the placeholder {value!r:.60}: known are {known}")
        elif not all(
            isinstance(v, _PLAIN) for v in (value if isinstance(value, list) else [value])
        ):
            table.reject(key, f"cannot be written as JSON: {value!r:.60}")


def _contradictions(top: Table, spec: Spec) -> None:
    """What each key allows and all together do not."""
    if spec.scales and spec.linear.alpha is not None:
        top.reject("scale", "and tensors.alpha both give the scaling: leave one of them out")
    if (spec.embedding is not None) and (
        (spec.embedding.alpha is None) != (spec.linear.alpha is None)
    ):
        top.reject("embedding", "and tensors must both have an alpha, or neither")
    if spec.config is None:
        for key, uses in {
            "scale": any(scale.keys for scale in spec.scales),
            "base_model": spec.base_model is not None,
            "declares_dora": bool(spec.declares),
            "write": spec.document is not None,
        }.items():
            if uses:
                top.reject(key, "needs 'config', the name of the file that holds it")
    for layout in spec.layouts:
        texts: dict[str, str] = {}
        for role, part in layout.parts():
            other = texts.setdefault(part.name.text, role)
            if other != role and part.name is not _EMPTY:
                key = "embedding" if layout.modules else "tensors"
                top.reject(key, f"has one name for {other} and for {role}")
