"""Which stored rows a module's weight is: by name, by the table of renames, by a prefix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dora_convert.core.bundle import Checkpoint
from dora_convert.planning.components import component_origins
from dora_convert.planning.names import Origin, Rows, Unsupported, module_tensors

__all__ = ["Resolver", "resolver"]


@dataclass(frozen=True, slots=True)
class Resolver:
    """Names of module tensors, and the rows of the checkpoint that each is made of.

    `prefix` is what the adapter's paths have too little (added) or too much (stripped), the base
    model prefix of transformers in nearly every case.
    """

    origins: Mapping[str, Origin]
    added: str = ""
    stripped: str = ""
    rivals: tuple[str, ...] = ()  # prefixes that fit as well, and mean other tensors

    def find(self, name: str) -> Origin | None:
        """The rows behind a module tensor such as `model.layers.0.mlp.up_proj.weight`."""
        exact = self.origins.get(name)
        if exact is not None:
            return exact
        if self.stripped and name.startswith(self.stripped):
            return self.origins.get(name.removeprefix(self.stripped))
        return self.origins.get(self.added + name) if self.added else None

    def near(self, name: str) -> list[str]:
        """Stored names that look like a name that was not found."""
        tail = ".".join(name.split(".")[-2:])
        candidates = [n for n in self.origins if n.endswith(tail)][:200]
        return difflib.get_close_matches(name, candidates or list(self.origins)[:2000], n=2)


def resolver(checkpoint: Checkpoint, paths: Iterable[str]) -> Resolver:
    """A resolver for this checkpoint, with the one prefix that lets the most paths be found."""
    shapes = {name: ref.spec.shape for name, ref in checkpoint.tensors.items()}
    origins: dict[str, Origin] = dict(module_tensors(checkpoint.config, shapes))
    # A name on disk means what it says, unless loading is known to make other data of it.
    for name, shape in shapes.items():
        if not isinstance(origins.get(name), Unsupported):
            origins[name] = (Rows(name, 0, shape[0] if shape else 1),)
    wanted = [f"{path}.weight" for path in paths]
    if any(name not in origins for name in wanted):
        origins = {**component_origins(checkpoint), **origins}
    missing = [name for name in wanted if name not in origins]
    plain = Resolver(origins)
    if not missing:
        return plain
    choices = [plain, *(Resolver(origins, added=p) for p in _added(missing, origins))]
    choices += [Resolver(origins, stripped=p) for p in _stripped(missing)]
    found = [[choice.find(name) for name in missing] for choice in choices]
    counts = [sum(origin is not None for origin in each) for each in found]
    best = counts.index(max(counts))
    rivals = tuple(
        choices[i].added or choices[i].stripped
        for i, count in enumerate(counts)
        if count == counts[best] and found[i] != found[best]
    )
    return replace(choices[best], rivals=rivals)


def _stripped(missing: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in missing:
        pieces = name.split(".")
        for n in (1, 2):
            if len(pieces) > n + 1:
                found[".".join(pieces[:n]) + "."] = None
    return list(found)[:20]


def _added(missing: Sequence[str], origins: Mapping[str, Origin]) -> list[str]:
    found: dict[str, None] = {}
    for name in missing[:20]:
        for known in origins:
            if known.endswith("." + name):
                found[known.removesuffix(name)] = None
    return list(found)[:20]
