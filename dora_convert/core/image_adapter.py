"""One file of an image model's adapter: a component, a module and a part in every name.

Trainers of such models differ in prefixes, in dots or underscores, and in what they call the parts,
and files that were converted mix them. So all spellings are understood here, and a format adds what
is its own. Sources: LyCORIS 4.1 `lycoris/modules/*.py`; sd-scripts `networks/lora.py`; OneTrainer
`modules/util/convert/lora/`; ComfyUI `comfy/weight_adapter/`; diffusers `loaders/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from dora_convert.core.adapter import Adapter, DoraModule, LayerKind, MagnitudeAxis
from dora_convert.core.assembly import common_axis, convolution, linear, magnitude, usable
from dora_convert.core.bundle import Bundle
from dora_convert.core.deltas import Delta, Factored, Hadamard, Kronecker, LowRank, Tucker
from dora_convert.core.peft_config import CONFIG
from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError

__all__ = [
    "ALPHA",
    "COMPONENTS",
    "ImageParts",
    "alpha_divisor",
    "image_layout",
    "image_modules",
    "image_parts",
    "no_writer",
    "whole_adapter",
]

ALPHA = "alpha"
# What diffusers' pipelines call the models that an adapter may be for.
COMPONENTS = (
    *("transformer.", "transformer_2.", "unet.", "prior.", "decoder."),
    *("text_encoder.", "text_encoder_2.", "text_encoder_3.", "text_encoder_4."),
)
_A = ".lora_A.weight"
_FACTORS = (_A, ".lora_linear_layer.down.weight")
_MAGNITUDE = "magnitude"
# A file that was dumped as it is in memory has the adapter's name in it.
_NAMED = r"(?:\.default)?"
_PARTS: Final = {
    "down": rf"\.(?:lora_down|lora_A|lora\.down|lora_linear_layer\.down){_NAMED}\.weight",
    "up": rf"\.(?:lora_up|lora_B|lora\.up|lora_linear_layer\.up){_NAMED}\.weight",
    "mid": r"\.lora_mid\.weight",
    ALPHA: r"\.alpha",
    _MAGNITUDE: rf"\.(?:dora_scale|lora_magnitude_vector{_NAMED}(?:\.weight)?|magnitude)",
    **{
        f"{family}_{part}": rf"\.{family}_{part}"
        for family, parts in (
            ("hada", ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            ("lokr", ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        )
        for part in parts
    },
}
_NAME = re.compile(
    r"(?P<path>.+?)(?:" + "|".join(f"(?P<{p}>{pattern})" for p, pattern in _PARTS.items()) + ")"
)
# Its layout says which axis it is of; a vector without a direction is one per output.
_DIRECTED = ".dora_scale"
# What no other layout of adapters has.
_KOHYA = re.compile(
    r".+(?:\.lora_(?:down|up|mid)\.weight|\.dora_scale|\.(?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))"
)
_AI_TOOLKIT = ".magnitude"


def image_layout(bundle: Bundle) -> str | None:
    """The format that names speak for, "kohya", "ai_toolkit" or "diffusers"; None for no image's.

    Files beside PEFT's config are PEFT's.
    """
    names = bundle.tensors
    if CONFIG in bundle.documents:
        return None
    alphas = any(name.endswith(".alpha") for name in names)
    if any(_KOHYA.fullmatch(name) or (alphas and name.endswith(_FACTORS)) for name in names):
        return "kohya"
    magnitudes = (n.removesuffix(_AI_TOOLKIT) for n in names if n.endswith(_AI_TOOLKIT))
    if any(path + _A in names for path in magnitudes):
        return "ai_toolkit"
    if any(name.endswith(_FACTORS) and name.startswith(COMPONENTS) for name in names):
        return "diffusers"
    return None


@dataclass(slots=True)
class ImageParts:
    """Tensors of modules by path and part; `unknown` are all others."""

    modules: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    unknown: list[TensorRef] = field(default_factory=list)


def image_parts(bundle: Bundle, problems: list[str]) -> ImageParts:
    """The tensors of a file by module, whose path is as the factors have it.

    Dots and underscores are one: diffusers' own conversion to kohya's names changes them in the
    factors' names and leaves them in the magnitude's.
    """
    parts = ImageParts()
    by_key: dict[str, dict[str, dict[str, TensorRef]]] = {}
    for name, ref in bundle.tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            parts.unknown.append(ref)
            continue
        part = found.lastgroup or ""
        spellings = by_key.setdefault(found["path"].replace(".", "_"), {})
        held = spellings.setdefault(found["path"], {})
        if part in held:
            other = held[part].stored.name
            problems.append(f"{other} and {ref.stored.name} are the same part of one module")
        held[part] = ref
    for spellings in by_key.values():
        path = next((p for p, held in spellings.items() if held.keys() - _BESIDE), None)
        path = path or next(iter(spellings))
        module = parts.modules[path] = {}
        for held in spellings.values():
            for part in held.keys() & module.keys():
                names = f"{module[part].stored.name} and {held[part].stored.name}"
                problems.append(f"{names} are the same part of one module")
            module.update(held)
    return parts


_BESIDE = {ALPHA, _MAGNITUDE}


def image_modules(
    parts: ImageParts,
    scalings: Mapping[str, float],
    axis: MagnitudeAxis | None,
    problems: list[str],
) -> dict[str, DoraModule]:
    """The modules in canonical layout, with `scalings` by path; `axis` is the user's word."""
    modules = {}
    undecided: list[str] = []
    for path, tensors in sorted(parts.modules.items()):
        delta = _delta(path, tensors, problems)
        if delta is None:
            continue
        vector, found = tensors.get(_MAGNITUDE), MagnitudeAxis.OUT
        if vector is not None:
            lengths = delta.shape[0], _channels(delta, vector)
            known = axis or _axis(path, vector, lengths, undecided)
            resolved = magnitude(path, vector, lengths, problems, axis=known)
            if resolved is None:
                continue
            vector, found = resolved
        kind = LayerKind.CONVOLUTION if delta.kernel else LayerKind.LINEAR
        modules[path] = DoraModule(path, delta, vector, found, scalings[path], kind=kind)
    if not parts.modules:
        problems.append("the file holds no LoRA or DoRA module")
    return common_axis(modules, undecided, problems)[0] if axis is None else modules


def whole_adapter(
    name: str,
    bundle: Bundle,
    parts: ImageParts,
    modules: Mapping[str, DoraModule],
    *,
    notes: Sequence[str],
    problems: Sequence[str],
) -> Adapter:
    """The adapter, for `planning.components` to find its modules' places in a base.

    Raises InputError for the problems, and for tensors that are no part of a module.
    """
    told = [
        f"{ref.stored.name} {list(ref.stored.shape)} is not understood" for ref in parts.unknown
    ]
    if told or problems:
        raise InputError(
            "the adapter cannot be used as it is",
            where=(str(bundle.root), f"read as {name}"),
            problems=[*problems, *told],
            hint="Tensors that may be left out are named with --ignore GLOB." if told else "",
        )
    plain = sum(module.magnitude is None for module in modules.values())
    if plain == len(modules):
        notes = [*notes, "plain LoRA: the adapter holds no magnitude"]
    elif plain:
        notes = [*notes, f"{plain} of {len(modules)} modules hold no magnitude: plain LoRA"]
    return Adapter(name, dict(modules), is_place_open=True, notes=tuple(notes))


def no_writer(title: str, reason: str) -> NoReturn:
    """Raise the InputError for a layout that is read and not written."""
    raise InputError(
        f"{title}: this layout is read, and not written",
        problems=[reason],
        hint="merge puts the adapter into the model; to-lora --for comfyui or diffusers makes a "
        "plain LoRA of it.",
    )


def alpha_divisor(tensors: Mapping[str, TensorRef]) -> int | None:
    """What a module's alpha is divided by; None where LyCORIS makes no use of it."""
    for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        shape = tensors[part].spec.shape if part in tensors else ()
        if shape and shape[0]:
            return shape[0]
    return None


def _channels(delta: Delta, vector: TensorRef) -> int:
    """How many inputs there are that a magnitude may belong to, a kernel's elements aside."""
    columns, count = delta.shape[1], vector.spec.numel
    if delta.kernel is None:
        return count if columns % max(count, 1) == 0 else columns
    return columns // max(math.prod(delta.kernel), 1)


def _axis(
    path: str, vector: TensorRef, lengths: tuple[int, int], undecided: list[str]
) -> MagnitudeAxis:
    """What the layout says: `[1, in, 1...]` or `[out, 1...]`, or a vector, one per output."""
    shape, (out, channels) = vector.spec.shape, lengths
    if not vector.stored.name.endswith(_DIRECTED) or len(shape) < 2 or shape[0] != 1:
        return MagnitudeAxis.OUT
    if len(shape) > 2 and shape[1] == out:
        # It may also be PEFT's [1, out, 1, 1] under another name.
        if channels != out:
            return MagnitudeAxis.OUT
        undecided.append(path)
    return MagnitudeAxis.IN


def _delta(path: str, tensors: Mapping[str, TensorRef], problems: list[str]) -> Delta | None:
    held = {part: ref for part, ref in tensors.items() if part not in _BESIDE}
    families = {"lora" if part in _LORA else part.partition("_")[0] for part in held}
    if len(families) != 1:
        found = ", ".join(sorted(ref.stored.name for ref in tensors.values()))
        what = "factors of several kinds" if families else "a magnitude or an alpha, and no factors"
        problems.append(f"{path}: {what} ({found})")
        return None
    if not usable(path, tuple(held.values()), problems):
        return None
    build = {"lora": _lora, "hada": _hadamard, "lokr": _kronecker}[families.pop()]
    try:
        delta = build(path, held, problems)
    except KeyError as error:
        found = ", ".join(sorted(ref.stored.name for ref in held.values()))
        problems.append(f"{path}: {error.args[0]} is missing (there is {found})")
        return None
    return delta


_LORA = {"down", "up", "mid"}


def _lora(path: str, held: Mapping[str, TensorRef], problems: list[str]) -> Factored | None:
    down, up = held["down"], held["up"]
    if "mid" in held:
        return _tucker(path, held["mid"], up, down, problems)
    return (convolution if len(down.spec.shape) > 2 else linear)(path, down, up, problems)


def _tucker(
    path: str, mid: TensorRef, up: TensorRef, down: TensorRef, problems: list[str]
) -> Tucker | None:
    up, down = up.matrix(), down.matrix()
    if len(mid.spec.shape) < 3 or mid.spec.shape[:2] != (up.spec.shape[1], down.spec.shape[0]):
        problems.append(f"{path}: the factors do not go together, {_shapes(mid, up, down)}")
        return None
    return Tucker(down, mid, up)


def _pair(
    path: str, held: Mapping[str, TensorRef], name: str, core: str, problems: list[str]
) -> Factored | None:
    """`NAME_a @ NAME_b`, or with a core `einsum("ij...,ip,jr->pr...", core, NAME_a, NAME_b)`."""
    a, b = held[f"{name}_a"], held[f"{name}_b"]
    if core in held:
        matrices = len(a.spec.shape) == 2 and len(b.spec.shape) == 2
        if matrices and len(held[core].spec.shape) > 2:
            return _tucker(path, held[core], a.transposed(), b, problems)
        problems.append(f"{path}: the factors do not go together, {_shapes(held[core], a, b)}")
        return None
    return linear(path, b.matrix(), a, problems)


def _hadamard(path: str, held: Mapping[str, TensorRef], problems: list[str]) -> Hadamard | None:
    left = _pair(path, held, "hada_w1", "hada_t1", problems)
    right = _pair(path, held, "hada_w2", "hada_t2", problems)
    if left is None or right is None:
        return None
    if left.shape != right.shape or left.kernel != right.kernel:
        problems.append(f"{path}: the two products are {list(left.shape)} and {list(right.shape)}")
        return None
    return Hadamard(left, right)


def _kronecker(path: str, held: Mapping[str, TensorRef], problems: list[str]) -> Kronecker | None:
    left: TensorRef | LowRank | None
    right: TensorRef | Factored | None
    kernel: tuple[int, ...] | None
    if "lokr_w1" in held:
        left = held["lokr_w1"].matrix()
    else:
        left = linear(path, held["lokr_w1_b"], held["lokr_w1_a"], problems)
    if "lokr_w2" in held:
        right, kernel = held["lokr_w2"].matrix(), held["lokr_w2"].spec.shape[2:]
    else:
        right = _pair(path, held, "lokr_w2", "lokr_t2", problems)
        # A convolution's second factor is flattened, whatever the kernel.
        kernel = right.kernel if isinstance(right, Tucker) else None
    return None if left is None or right is None else Kronecker(left, right, kernel)


def _shapes(*refs: TensorRef) -> str:
    return ", ".join(str(list(ref.spec.shape)) for ref in refs)
