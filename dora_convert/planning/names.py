"""From the names of a checkpoint on disk to those in the tree of modules that an adapter uses.

transformers 5 renames and cuts tensors while it loads, and undoes it when it saves. Its rules are
data here (`names.json`, written by `scripts/dump_name_rules.py`); this module applies them in its
order: every renaming in turn, then at most one conversion (core_model_loading.rename_source_key).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, TypeAlias

from dora_convert.core.bundle import Json

__all__ = ["Origin", "Rows", "Unsupported", "module_tensors"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start:stop` of one stored tensor; all of them for a tensor that is only renamed."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The tensor is made of stored ones by more than cutting and joining rows."""

    reason: str


Origin: TypeAlias = tuple[Rows, ...] | Unsupported


@dataclass(frozen=True, slots=True)
class _Part:
    """A model class in the tree of modules; its rules hold below `path`."""

    path: str
    name: str
    kind: str | None  # model type


@dataclass(frozen=True, slots=True)
class _Use:
    """An entry of the rule table and the prefixes it holds under, None for everywhere."""

    entry: str
    prefixes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Rule:
    """One renaming, or the part of a conversion that touches names."""

    find: re.Pattern[str]
    put: tuple[str, ...]
    prefixes: tuple[str, ...] | None
    paired: bool = False  # the Nth source becomes the Nth target, once the first was seen
    offset: int = 0  # added to the layer number
    sources: tuple[str, ...] = ()
    operations: tuple[Json, ...] = ()

    def renamed(self, name: str) -> tuple[str, int] | None:
        """Give the new name and the number of the source that matched."""
        prefix = ""
        if self.prefixes is not None:
            found = next((p for p in self.prefixes if name.startswith(p)), None)
            if found is None:
                return None
            prefix, name = found, name[len(found) :]
        match = self.find.search(name)
        if match is None:
            return None
        source = next(int(g[1:]) for g, text in match.groupdict().items() if text is not None)
        put = self.put[source if self.paired else 0]
        if "\\" in put:
            put = self._filled(put, match, self.find.groupindex[f"g{source}"])
        # The first place where the text occurs, even if the match is further on: as transformers.
        return prefix + name.replace(match.group(), put, 1), source

    def _filled(self, put: str, match: re.Match[str], outer: int) -> str:
        def text(reference: re.Match[str]) -> str:
            found = match.group(outer + int(reference[1]))
            return str(int(found) + self.offset) if self.offset else str(found)

        return re.sub(r"\\(\d)", text, put)


@dataclass(slots=True)
class _Gathered:
    """Stored tensors that take part in one conversion, by number of the source they matched."""

    rule: _Rule
    names: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))


def module_tensors(config: Json, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Origin]:
    """Every name that a module tensor of this model may have, and the stored rows it is made of.

    Names that do not change are left out. A name in here that is also one on disk means another
    tensor, or other rows, in the tree of modules: what is said here is what an adapter means.
    """
    text = resources.files(__package__).joinpath("names.json").read_text(encoding="utf-8")
    table: Json = json.loads(text)
    out: dict[str, Origin] = {}
    done: list[list[_Use]] = []
    for name, section in _candidates(table, config):
        uses = [*_uses(table, name, section), _Use("legacy")]
        if uses not in done:
            done.append(uses)
            for module, origin in _mapped(_rules(table, uses), config, tensors).items():
                out.setdefault(module, origin)
    return out


def _candidates(table: Json, config: Json) -> list[tuple[str, Json]]:
    """Classes that the adapter may have been trained on, likeliest first, with their configs.

    The causal model of a multimodal checkpoint is one: AutoModelForCausalLM loads it (Qwen 3.5).
    """
    kind = config.get("model_type")
    classes, factories = table["classes"], table["factories"]
    names = list(config.get("architectures") or ())
    if not any(name in classes or name in table["rules"] for name in names):
        names += [factories[f][kind] for f in ("vlm", "base") if kind in factories[f]][:1]
    if kind in factories["causal"]:
        names.append(factories["causal"][kind])
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    out = []
    for name in names or [""]:
        own = classes.get(name, {}).get("type", kind)
        section = next((s for s in sections if s.get("model_type") == own), config)
        out.append((name, section))
    return out


def _parts(table: Json, part: _Part, config: Json) -> Iterator[_Part]:
    """Walk a class and those inside it, from the outside in (`named_modules`)."""
    yield part
    entry = table["classes"].get(part.name, {"parts": ()})
    for path, written, key, factory in entry["parts"]:
        name = written
        section = config if key is not None else {}
        for step in (key or "").split("."):
            inner = section.get(step) if step else section
            section = inner if isinstance(inner, Mapping) else {}
        kind = section.get("model_type")
        if factory and kind:
            # Whatever class that factory makes of it; the table leaves out those without rules.
            name = table["factories"][factory].get(kind, "")
        kind = kind or table["classes"].get(name, {}).get("type")
        full = f"{part.path}.{path}" if part.path else path
        yield from _parts(table, _Part(full, name, kind), section)


def _uses(table: Json, name: str, config: Json) -> list[_Use]:
    """Which entries hold where (conversion_mapping.get_model_conversion_mapping).

    A class name comes before its model type; what an outer module has brought in holds below it.
    """
    classes, rules = table["classes"], table["rules"]
    base = classes.get(name, {}).get("prefix", "")
    root = _Part("", name, config.get("model_type") or classes.get(name, {}).get("type"))
    seen: dict[str | None, list[str]] = defaultdict(list)

    def is_covered(key: str | None, path: str) -> bool:
        return any(above == "" or path.startswith(f"{above}.") for above in seen[key])

    out = []
    for part in _parts(table, root, config):
        key = part.name if part.name in rules else part.kind
        if key not in rules or any(is_covered(used, part.path) for used in (part.name, key)):
            continue
        for used in {part.name, key}:
            seen[used].append(part.path)
        prefixes = None
        if part.path:
            scope = part.path.removeprefix(base).removeprefix(".")
            inner, outer = (f"{p}." if p else "" for p in (scope, base))
            prefixes = (outer + inner, inner)
        out.append(_Use(str(key), prefixes))
    return out


def _rules(table: Json, uses: list[_Use]) -> list[_Rule]:
    """Compile the rules of some entries, renamings first."""
    out = []
    for use in uses:
        entry = table["rules"][use.entry]
        if isinstance(entry, str):
            entry = table["rules"][entry]
        for rule in entry:
            compiled = _Rule(
                find=re.compile(rule["find"]),
                put=tuple(rule["put"]),
                prefixes=use.prefixes,
                paired=rule.get("paired", False),
                offset=rule.get("offset", 0),
                sources=tuple(rule.get("sources", ())),
                operations=tuple(rule.get("operations", ())),
            )
            out.append(compiled)
    return sorted(out, key=lambda rule: bool(rule.operations))


def _mapped(
    rules: list[_Rule], config: Json, tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, Origin]:
    claims: dict[str, list[Origin]] = defaultdict(list)
    gathered: dict[tuple[str, int], _Gathered] = {}
    still: set[str] = set()
    # A pair is renamed only once its first name was met, so there the order counts.
    in_order = sorted(tensors, key=_natural) if any(r.paired for r in rules) else tensors
    awake: set[int] = set()
    for stored in in_order:
        name, source, last = _follow(rules, stored, awake)
        if last is not None:
            group = gathered.setdefault((name, id(last)), _Gathered(last))
            group.names[source].append(stored)
        elif name == stored:
            still.add(stored)
        else:
            claims[name].append(_whole(stored, tensors))
    for (name, _), group in gathered.items():
        for module, origin in _converted(group, name, config, tensors).items():
            claims[module].append(origin)
    return {name: _only(name, found, name in still) for name, found in claims.items()}


def _follow(rules: list[_Rule], name: str, awake: set[int]) -> tuple[str, int, _Rule | None]:
    for number, rule in enumerate(rules):
        found = rule.renamed(name)
        if found is None:
            continue
        if rule.paired:
            if found[1] == 0:
                awake.add(number)
            elif number not in awake:
                continue
        name = found[0]
        if rule.operations:
            return name, found[1], rule
    return name, 0, None


def _only(name: str, found: list[Origin], is_stored: bool) -> Origin:
    if len(found) == 1 and not is_stored:
        return found[0]
    names = [name] if is_stored else []
    for origin in found:
        names += [] if isinstance(origin, Unsupported) else [rows.tensor for rows in origin]
    return Unsupported(f"more than one stored tensor stands for it: {_listed(names)}")


def _whole(name: str, tensors: Mapping[str, tuple[int, ...]]) -> tuple[Rows, ...]:
    shape = tensors[name]
    return (Rows(name, 0, shape[0] if shape else 1),)


def _natural(name: str) -> list[str | int]:
    """Sort numbers as numbers (core_model_loading.dot_natural_key); every second piece is one."""
    return [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", name)]


_Values: TypeAlias = dict[str, Origin]


def _converted(
    group: _Gathered, name: str, config: Json, tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, Origin]:
    """Say what a conversion makes of its stored tensors, by module name."""
    rule = group.rule
    values: _Values = {}
    for number, pattern in enumerate(rule.sources):
        names = sorted(group.names.get(number, ()), key=_natural)
        if names:
            values[pattern] = tuple(rows for stored in names for rows in _whole(stored, tensors))
    stored = [name for names in group.names.values() for name in names]
    done = _operated(rule, values, config) if len(values) == len(rule.sources) else None
    if done is None or set(done) != set(rule.put):
        what = " and then ".join(_told(operation) for operation in rule.operations)
        refused = Unsupported(f"it is made of {_listed(stored)} by {what}")
        done = dict.fromkeys(rule.put, refused)
    before, _, after = next(name.partition(target) for target in rule.put if target in name)
    return {before + target + after: origin for target, origin in done.items()}


def _operated(rule: _Rule, values: _Values, config: Json) -> _Values | None:
    """Do the operations on rows alone; None where one of them does more than that."""
    for operation in rule.operations:
        name, dim = operation["name"], operation.get("dim")
        if name == "Chunk" and dim == 0 and not operation["num_shards_attribute"]:
            (whole,) = values.values()
            shares = [1] * len(rule.put)
        elif name == "Split" and dim == 0:
            (whole,) = values.values()
            shares = _head_counts(config)
        elif name == "Concatenate" and dim == 0:
            joined: list[Rows] = []
            for source in rule.sources:
                origin = values[source]
                assert not isinstance(origin, Unsupported), operation
                joined += origin
            values = {rule.put[0]: tuple(joined)}
            continue
        elif name == "PermuteForRope" and len(rule.put) > 1 == len(rule.sources):
            moved = operation["permute_layer_names"]
            values = {
                target: _permuted(origin)
                if moved is None or any(layer in target for layer in moved)
                else origin
                for target, origin in values.items()
            }
            continue
        else:
            return None
        if isinstance(whole, Unsupported) or len(whole) > 1 or len(shares) != len(rule.put):
            return None
        values = _shared(whole[0], dict(zip(rule.put, shares, strict=True)))
    return values


def _shared(whole: Rows, shares: dict[str, int]) -> _Values:
    """Cut rows in proportion; nothing where they do not divide."""
    unit, rest = divmod(whole.stop - whole.start, sum(shares.values()))
    out: _Values = {}
    start = whole.start
    for target, share in shares.items():
        stop = start + share * unit
        out[target] = (Rows(whole.tensor, start, stop),)
        start = stop
    return {} if rest else out


def _head_counts(config: Json) -> list[int]:
    """Heads of queries, keys and values: Split is only used on these, all of one head size."""
    section: Any = config.get("text_config") or config
    heads = section.get("num_attention_heads")
    key_heads = section.get("num_key_value_heads") or heads
    return [heads, key_heads, key_heads] if heads else []


def _permuted(origin: Origin) -> Unsupported:
    names = [] if isinstance(origin, Unsupported) else [rows.tensor for rows in origin]
    return Unsupported(f"it is made of {_listed(names)} by {_TOLD['PermuteForRope']}")


_TOLD = {
    "Chunk": "cutting",
    "Concatenate": "joining",
    "ErnieFuseAndSplitTextVisionExperts": "stacking and joining experts",
    "Interleave": "taking every second row or column",
    "MergeModulelist": "stacking experts",
    "PermuteForRope": "reordering the rows of each attention head",
    "Split": "cutting",
    "Transpose": "swapping axes",
}


def _told(operation: Json) -> str:
    what = _TOLD[operation["name"]]
    return f"{what} along axis {operation['dim']}" if "dim" in operation else what


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
