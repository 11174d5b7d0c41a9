"""A LoRA's pairs laid out as one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_convert.core.pairs import LoraFile, Pair
from dora_convert.core.plan import Document
from dora_convert.storage.header import PT_METADATA, layout

__all__ = ["safetensors_file"]


def safetensors_file(
    name: str,
    pairs: Sequence[Pair],
    documents: Sequence[Document] = (),
    metadata: Mapping[str, str] = PT_METADATA,
) -> LoraFile:
    """Every byte's place, with the documents that go beside."""
    specs = (factor.spec for pair in pairs for factor in (pair.down, pair.up))
    file = layout(specs, metadata)
    return LoraFile(name, file.head, file.starts, file.size, tuple(pairs), tuple(documents))
