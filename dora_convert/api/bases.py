"""The base model, as dense weights whatever it is stored in."""

from __future__ import annotations

from pathlib import Path

from dora_convert.api.reading import ReadOptions
from dora_convert.core.bundle import Checkpoint
from dora_convert.hub.locate import local_path
from dora_convert.planning.families import quantization, transposed_modules
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.selection import base_files

__all__ = ["open_base"]


def open_base(path: Path, options: ReadOptions) -> Checkpoint:
    """Headers and config; the weights of a quantised base stand for what they decode to.

    With `trained_on`, those of a dense one stand for what they were in training. Raises InputError,
    also for a quantisation that is not known, and HubError.
    """
    checkpoint = open_checkpoint(local_path(path, base_files), allow_pickle=options.allow_pickle)
    if quantization(checkpoint.config) is not None:
        from dora_convert.execution.decoding import decoded

        checkpoint = decoded(checkpoint)
    return checkpoint if options.trained_on is None else _as_trained(checkpoint, options)


def _as_trained(checkpoint: Checkpoint, options: ReadOptions) -> Checkpoint:
    from dora_convert.execution.decoding import as_trained

    assert options.trained_on is not None
    transposed = transposed_modules(checkpoint.config, options.transposed)
    return as_trained(checkpoint, options.trained_on, transposed=transposed)
