"""A described layout to read from and write to, and adapters as values."""

from __future__ import annotations

from typing import Any

from dora_convert.core.bundle import Bundle
from dora_convert.core.spec.format import SpecFormat
from dora_convert.core.spec.parsing import parse
from dora_convert.core.tensors import TensorRef

from .values import NOWHERE, ref

__all__ = ["TENSORS", "described", "files", "layer"]

TENSORS = """\
[tensors]
down = "{module}.a"
up = "{module}.b"
magnitude = { name = "{module}.m", shape = ["out"] }
"""


def described(text: str) -> SpecFormat:
    return SpecFormat(parse(text, name="mine", file="mine.toml"))


def layer(path: str = "x.q", out: int = 6, inner: int = 10, rank: int = 4) -> dict[str, TensorRef]:
    shapes = {"a": (rank, inner), "b": (out, rank), "m": (out,)}
    return {f"{path}.{n}": ref(f"{path}.{n}", *shape) for n, shape in shapes.items()}


def files(tensors: dict[str, TensorRef], config: Any = None, **scalars: float) -> Bundle:
    documents = {} if config is None else {"c.json": config}
    return Bundle(NOWHERE, tensors, documents, {k.replace("_", "."): v for k, v in scalars.items()})
