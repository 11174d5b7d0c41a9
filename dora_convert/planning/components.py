"""The models of an image pipeline, and which module of which of them an adapter's name means.

An adapter names a component (`lora_unet_`, `transformer.`) and a module in it, with dots or with
underscores in their place, by the names of diffusers or of the model's author. A base is a folder
of components, one of them, or one file with prefixes. Sources: sd-scripts `networks/lora*.py`,
OneTrainer `convert_lora_util.py`, ComfyUI `comfy/lora.py`, diffusers `single_file_utils.py`.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dora_convert.core.adapter import Adapter, DoraModule, LayerKind
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.tensors import COMPONENT_MARK
from dora_convert.errors import MismatchError
from dora_convert.planning.image_names import other_names
from dora_convert.planning.names import Origin, Rows, Unsupported

__all__ = ["component_origins", "placed"]


class _Role(enum.Enum):
    DENOISER = "denoiser"
    TEXT = "text encoder"
    NONE = "part that no adapter is for"


# What an adapter puts before a module's path: for which role, and the how manieth of it. OneTrainer
# has te2 where kohya has te3, for the T5 of Flux: which one it is the modules' names decide.
_ADAPTED: Final = (
    (re.compile(r"lora_(?:unet_?|transformer|prior_unet)_|lycoris_"), _Role.DENOISER, 1),
    (re.compile(r"(?:model\.)?diffusion_model\.|(?:unet|prior|transformer)\."), _Role.DENOISER, 1),
    (re.compile(r"transformer_2\."), _Role.DENOISER, 2),
    *(
        (re.compile(rf"lora_te{kohya}_|text_encoder{diffusers}\."), _Role.TEXT, number)
        for number, (kohya, diffusers) in enumerate((("1?", ""), ("2", "_2"), ("3", "_3")), 1)
    ),
    (re.compile(r"text_encoders\.clip_l\.transformer\."), _Role.TEXT, 1),
    (re.compile(r"text_encoders\.\w+\.transformer\."), _Role.TEXT, 2),
    (re.compile(r"(?:base_model\.model\.)?"), _Role.DENOISER, 1),
)
# What a component's tensors begin with in one file for all of them.
_PREFIXES: Final = (
    (re.compile(r"model\.diffusion_model\."), _Role.DENOISER),
    (re.compile(r"cond_stage_model\.(?:transformer|model)\."), _Role.TEXT),
    (re.compile(r"conditioner\.embedders\.\d\.(?:transformer|model)\."), _Role.TEXT),
    (re.compile(r"text_encoders\.\w+\.(?:transformer|model)\."), _Role.TEXT),
    (re.compile(r"first_stage_model\.|vae\."), _Role.NONE),
)
_FOLDERS: Final = ("unet", "transformer", "transformer_2", "prior", "decoder", "text_encoder")
_CLIP: Final = "text_model."
_TEXT: Final = (
    *(_CLIP, "encoder.layers.", "embeddings.token_embedding."),
    *("encoder.block.", "transformer.resblocks.", "model.layers."),
)
_WEIGHT: Final = ".weight"


@dataclass(frozen=True, slots=True)
class _Component:
    """One model of a base; `prefix` is what its tensors' names begin with there.

    `paths` are those of its modules, by themselves and by what underscores make of them, in its own
    names and in the other scheme's; `origins` the tensors of the other scheme.
    """

    prefix: str
    role: _Role
    paths: Mapping[str, str]
    origins: Mapping[str, Origin]


@dataclass(frozen=True, slots=True)
class _Group:
    """What an adapter has for one component: the rest of each path, by the whole of it."""

    prefix: str
    role: _Role
    number: int
    rests: Mapping[str, str]


def placed(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """The adapter with the paths that its modules have in this base, or in its other scheme.

    Raises MismatchError with every module that has no place there.
    """
    if not adapter.is_place_open:
        return adapter
    components = _components(checkpoint)
    modules: dict[str, DoraModule] = {}
    problems: list[str] = []
    lacking: list[str] = []
    for group in _groups(adapter.modules):
        component = _chosen(group, components)
        if component is None:
            lacking.append(group.prefix)
            some = "1 module" if len(group.rests) == 1 else f"{len(group.rests)} modules"
            problems.append(
                f"{group.prefix or 'names without a prefix'}: {some} of a {group.role.value}, "
                "none of which is in the base"
            )
            continue
        for path, rest in group.rests.items():
            found = _path(rest, component)
            if found is None:
                problems.append(f"{path}: the base has no module of that name")
                continue
            name = component.prefix + found
            if name in modules:
                problems.append(f"{modules[name].path} and {path} are both {name}")
            modules[name] = _as_stored(adapter.modules[path], name, checkpoint, component)
    if problems:
        raise MismatchError(
            "the adapter does not fit this base",
            where=f"base      {checkpoint.root}",
            problems=problems,
            hint=_hint(lacking),
        )
    return replace(adapter, modules=modules, is_place_open=False)


def component_origins(checkpoint: Checkpoint) -> dict[str, Origin]:
    """Tensors of the base's components as the other scheme of names calls them."""
    return {
        component.prefix + name: origin
        for component in _components(checkpoint)
        for name, origin in component.origins.items()
    }


def _groups(paths: Iterable[str]) -> list[_Group]:
    found: dict[tuple[str, _Role, int], dict[str, str]] = defaultdict(dict)
    for path in paths:
        for pattern, role, number in _ADAPTED:
            match = pattern.match(path)
            if match is not None:
                found[match[0], role, number][path] = path[match.end() :]
                break
    return [_Group(*key, rests) for key, rests in found.items()]


def _components(checkpoint: Checkpoint) -> list[_Component]:
    """In the order of their names, which is that of their numbers."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    roles: dict[str, _Role] = {}
    for name, ref in checkpoint.tensors.items():
        prefix, role = _prefix(name)
        roles[prefix] = role
        shapes[prefix][name.removeprefix(prefix)] = ref.spec.shape
    if roles.keys() == {""}:
        is_text = any(name.startswith(_TEXT) for name in shapes[""])
        roles[""] = _Role.TEXT if is_text else _Role.DENOISER
    return [
        _component(prefix, roles[prefix], shapes[prefix])
        for prefix in sorted(shapes)
        if roles[prefix] is not _Role.NONE
    ]


def _prefix(name: str) -> tuple[str, _Role]:
    """What a tensor's name has before the one in its component, and the component's role."""
    folder, mark, _ = name.partition(COMPONENT_MARK)
    if mark:
        role = _Role.TEXT if folder.startswith(_FOLDERS[-1]) else _Role.DENOISER
        return folder + mark, role if folder.startswith(_FOLDERS) else _Role.NONE
    for pattern, role in _PREFIXES:
        match = pattern.match(name)
        if match is not None:
            return match[0], role
    return "", _Role.NONE


def _component(prefix: str, role: _Role, shapes: Mapping[str, tuple[int, ...]]) -> _Component:
    others = other_names(shapes)
    paths: dict[str, str] = {}
    # The base's own names win, and names with their dots over those without.
    for names in (others, shapes):
        known = [name.removesuffix(_WEIGHT) for name in names if name.endswith(_WEIGHT)]
        asked = {_clip(path): path for path in known} if role is _Role.TEXT else {}
        asked |= {path: path for path in known}
        flat: dict[str, set[str]] = defaultdict(set)
        for name, path in asked.items():
            flat[_flat(name)].add(path)
        asked = {name: path for name, (path, *more) in flat.items() if not more} | asked
        paths |= {name: _own_path(path, others, shapes) for name, path in asked.items()}
    origins = {name: _moved(origin, prefix) for name, origin in others.items()}
    return _Component(prefix, role, paths, origins)


def _clip(path: str) -> str:
    """The same module of a CLIP as transformers called it before version 5, or has since."""
    return path.removeprefix(_CLIP) if path.startswith(_CLIP) else _CLIP + path


def _own_path(
    path: str, others: Mapping[str, Origin], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """What the base itself calls a module, if its weight is one whole tensor there."""
    origin = others.get(path + _WEIGHT)
    if not isinstance(origin, tuple) or len(origin) > 1 or not origin[0].tensor.endswith(_WEIGHT):
        return path
    stored = origin[0].tensor
    whole = origin[0] == Rows(stored, 0, shapes[stored][0])
    return stored.removesuffix(_WEIGHT) if whole else path


def _moved(origin: Origin, prefix: str) -> Origin:
    if isinstance(origin, Unsupported):
        return origin
    return tuple(replace(rows, tensor=prefix + rows.tensor) for rows in origin)


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _path(rest: str, component: _Component) -> str | None:
    return component.paths.get(rest) or component.paths.get(_flat(rest))


def _chosen(group: _Group, components: Sequence[_Component]) -> _Component | None:
    """The component of that role in which most is found; of equals, the one of that number."""
    able = [component for component in components if component.role is group.role]
    counts = [
        sum(_path(rest, component) is not None for rest in group.rests.values())
        for component in able
    ]
    most = max(counts, default=0)
    if not most:
        return None
    best = [component for component, count in zip(able, counts, strict=True) if count == most]
    numbered = able[group.number - 1 : group.number]
    return numbered[0] if numbered and numbered[0] in best else best[0]


def _as_stored(
    module: DoraModule, name: str, checkpoint: Checkpoint, component: _Component
) -> DoraModule:
    """Renamed, and as the kind of layer that the base has: 1 x 1 convolutions may be linear."""
    origin = component.origins.get(name.removeprefix(component.prefix) + _WEIGHT)
    stored = origin[0].tensor if isinstance(origin, tuple) else name + _WEIGHT
    axes = len(checkpoint.tensors[stored].spec.shape) if stored in checkpoint.tensors else 2
    kind = LayerKind.CONVOLUTION if axes > 2 else LayerKind.LINEAR
    return replace(module, path=name, kind=kind)


def _hint(lacking: Sequence[str]) -> str:
    if not lacking:
        return "Is this the model that the adapter was trained on?"
    globs = " ".join(f"--exclude '{prefix}*'" for prefix in lacking if prefix)
    leave = f", or leave those modules out with {globs}" if globs else ""
    return f"Give the folder of the whole pipeline, or the file with all of its models{leave}."
