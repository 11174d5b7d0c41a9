"""Second moments of what a model's linear layers see: collected, stored, read module by module.

A moment of up to `LIMIT` inputs is stored as its root, `[in, in]`. A larger one is stored as
`factor @ factor.T + diag(diagonal)²` with a factor `[in, LIMIT]`: a Nystrom sketch (one pass over
the inputs, memory of the sketch alone), and what it lacks on the diagonal, which is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_convert.core.tensors import TensorRef
from dora_convert.errors import InputError, MismatchError
from dora_convert.maths.weighting import Weight
from dora_convert.storage.header import read_header
from dora_convert.storage.oserrors import reading, writing
from dora_convert.storage.reader import Reader

__all__ = ["LIMIT", "Sketch", "Stats", "collect", "open_stats", "save_stats"]

LIMIT = 512
_SCHEMA = "dora-convert/stats/1"


class Sketch:
    """The second moment of vectors that come in batches."""

    def __init__(self, size: int) -> None:
        self._probe: Tensor | None = None
        if size > LIMIT:
            seeded = torch.Generator().manual_seed(size)
            start = torch.randn((size, LIMIT), generator=seeded, dtype=torch.float64)
            self._probe = torch.linalg.qr(start).Q
        self._image = torch.zeros((size, min(size, LIMIT)), dtype=torch.float64)
        self._squares = torch.zeros(size, dtype=torch.float64)
        self._count = 0

    def add(self, x: Tensor) -> None:
        """`x` is `[n, in]`."""
        x = x.double()
        self._image.addmm_(x.T, x if self._probe is None else x @ self._probe)
        self._squares += x.square().sum(dim=0)
        self._count += len(x)

    def weight(self) -> Weight:
        """The mean so far."""
        image, squares = self._image / self._count, self._squares / self._count
        core = image if self._probe is None else self._probe.T @ image
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        if self._probe is None:
            return Weight(vectors * values.clamp_min(0).sqrt(), None)
        # Directions that drown in rounding are left to the diagonal.
        held = values > values[-1] * 1e-10
        factor = image @ (vectors[:, held] / values[held].sqrt())
        rest = squares - factor.square().sum(dim=1)
        return Weight(factor, rest.clamp_min(0).sqrt())


def collect(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Sketch]:
    """Run the model; returns a sketch for each linear layer that was called.

    Layers that were given the same tensor (query, key, value) share one. No batch may hold padding.
    """
    sketches: dict[str, Sketch] = {}
    seen: list[tuple[Tensor, Sketch]] = []

    def hook(path: str) -> Callable[[nn.Module, Any], None]:
        def before(_: nn.Module, given: Any) -> None:
            x = given[0]
            flat = x.detach().reshape(-1, x.shape[-1])
            known = sketches.get(path)
            for tensor, sketch in seen:
                if tensor is x and known in (None, sketch):
                    sketches[path] = sketch
                    return
            if known is None:
                known = sketches[path] = Sketch(flat.shape[1])
            seen.append((x, known))
            if len(flat):
                known.add(flat)

        return before

    hooks = [
        module.register_forward_pre_hook(hook(path))
        for path, module in model.named_modules()
        # Conv1D is GPT-2's linear layer, stored [in, out].
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
                seen.clear()
    finally:
        for handle in hooks:
            handle.remove()
    return sketches


def save_stats(file: Path, sketches: Mapping[str, Sketch], *, mark: str) -> None:
    """`mark` identifies the base. Factors are written as float32."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}
    modules: dict[str, int] = {}
    for path, sketch in sketches.items():
        number = numbers.setdefault(id(sketch), len(numbers))
        modules[path] = number
        if f"{number}.factor" in tensors:
            continue
        weight = sketch.weight()
        for name, tensor in (("factor", weight.factor), ("diagonal", weight.diagonal)):
            if tensor is not None:
                tensors[f"{number}.{name}"] = tensor.float().contiguous()
    # One entry: safetensors writes several in any order, and the same statistics are to be the same
    # bytes.
    about = {_SCHEMA: json.dumps({"base": mark, "modules": modules})}
    with writing(file):
        save_file(tensors, file, metadata=about)


@dataclass(frozen=True, slots=True)
class Stats:
    """A stats file: which entry a module has, and where its tensors are. Safe for threads."""

    modules: Mapping[str, int]
    tensors: Mapping[str, TensorRef]
    reader: Reader

    def find(self, path: str) -> int | None:
        """The entry of a module; paths may differ in what they begin with, if one alone fits."""
        if path in self.modules:
            return self.modules[path]
        near = [p for p in self.modules if p.endswith(f".{path}") or path.endswith(f".{p}")]
        return self.modules[near[0]] if len(near) == 1 else None

    def size(self, entry: int) -> int:
        """The number of inputs."""
        return self.tensors[f"{entry}.factor"].spec.shape[0]

    def weight(self, entry: int) -> Weight:
        """Read one."""
        factor = self.reader.load(self.tensors[f"{entry}.factor"]).double()
        rest = self.tensors.get(f"{entry}.diagonal")
        return Weight(factor, None if rest is None else self.reader.load(rest).double())


def open_stats(file: Path, *, mark: str) -> Stats:
    """Read the headers. Raises InputError for what is no such file, MismatchError by `mark`."""
    tensors = read_header(file)
    with reading(file), safe_open(file, framework="pt") as opened:
        about = _about(opened.metadata() or {})
    modules = about.get("modules", {})
    if not about or any(not _fits(tensors, entry) for entry in modules.values()):
        raise InputError(
            f"{file.name} does not hold statistics of inputs",
            where=str(file),
            hint="dora-convert stats MODEL --text FILE -o FILE makes one.",
        )
    if about.get("base") != mark:
        raise MismatchError(
            "the statistics were collected from another base model",
            where=str(file),
            hint="Collect them again: dora-convert stats MODEL --text FILE -o FILE.",
        )
    return Stats(modules, tensors, Reader())


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `save_stats` says of the file; nothing for what is no such file."""
    try:
        about = json.loads(metadata.get(_SCHEMA, ""))
    except (ValueError, RecursionError):
        return {}
    modules = about.get("modules") if isinstance(about, dict) else None
    good = isinstance(modules, dict) and all(type(n) is int for n in modules.values())
    return about if good else {}


def _fits(tensors: Mapping[str, TensorRef], entry: int) -> bool:
    factor, rest = tensors.get(f"{entry}.factor"), tensors.get(f"{entry}.diagonal")
    if factor is None or len(factor.spec.shape) != 2 or not factor.spec.dtype.is_weight:
        return False
    return rest is None or (rest.spec.shape == factor.spec.shape[:1] and rest.spec.dtype.is_weight)
