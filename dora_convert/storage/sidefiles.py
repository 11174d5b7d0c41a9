"""Small files beside the weights: what an adapter brings of its own, and writing them out."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import assert_never

from dora_convert.core.plan import CarriedFile, Document, WrittenFile
from dora_convert.storage.folders import leaves
from dora_convert.storage.oserrors import reading, writing

__all__ = ["documents_size", "own_files", "write_documents"]

# What tokenizers and processors of transformers save beside an adapter.
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "image_processor_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)


def own_files(adapter: Path, base: Path) -> dict[str, Path]:
    """The adapter's tokenizer and processor files that the base lacks, or has otherwise.

    A link out of the adapter's folder is none: what it shows could end up in what is published.
    """
    found = {}
    for name in _TOKENIZER:
        mine, theirs = adapter / name, base / name
        with reading(mine):
            if not mine.is_file() or leaves(adapter, mine):
                continue
            if not (theirs.is_file() and filecmp.cmp(mine, theirs, shallow=False)):
                found[name] = mine
    return found


def write_documents(documents: Iterable[Document], folder: Path) -> None:
    """Write or copy each into `folder`, and bring it to the disk. Modes follow the umask."""
    for document in documents:
        target = folder / document.name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            match document:
                case WrittenFile(_, text):
                    target.write_text(text, encoding="utf-8")
                case CarriedFile(_, source):
                    _copy(source, target)
                case _:
                    assert_never(document)
            fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def documents_size(documents: Iterable[Document]) -> int:
    """Bytes that they will take."""
    total = 0
    for document in documents:
        if isinstance(document, WrittenFile):
            total += len(document.text.encode())
        else:
            with reading(document.source):
                total += document.source.stat().st_size
    return total


def _copy(source: Path, target: Path) -> None:
    with reading(source):
        handle = source.open("rb")
    with handle, target.open("wb") as out:
        shutil.copyfileobj(handle, out)
