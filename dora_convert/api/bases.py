"""The base model, as dense weights whatever it is stored in."""

from __future__ import annotations

from pathlib import Path

from dora_convert.api.reading import ReadOptions
from dora_convert.core.bundle import Checkpoint
from dora_convert.planning.families import quantization
from dora_convert.storage.checkpoint import open_checkpoint

__all__ = ["open_base"]


def open_base(path: Path, options: ReadOptions) -> Checkpoint:
    """Headers and config; the weights of a quantised base stand for what they decode to.

    Raises InputError, also for a quantisation that is not known.
    """
    checkpoint = open_checkpoint(path, allow_pickle=options.allow_pickle)
    if quantization(checkpoint.config) is None:
        return checkpoint
    from dora_convert.execution.decoding import decoded

    return decoded(checkpoint)
