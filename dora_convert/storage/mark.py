"""A short mark by which a checkpoint is known again, without reading all of it."""

from __future__ import annotations

import hashlib

from dora_convert.core.bundle import Checkpoint
from dora_convert.core.tensors import Slice
from dora_convert.storage.opening import opened, pread_exactly

__all__ = ["checkpoint_mark"]

_SAMPLE = 4096


def checkpoint_mark(checkpoint: Checkpoint) -> str:
    """A hash of every tensor's name, type and shape, and of its first 4 kB.

    Of pickles, names and shapes alone. How tensors are spread over files makes no difference.
    """
    total = hashlib.sha256()
    for name, ref in sorted(checkpoint.tensors.items()):
        total.update(repr((name, ref.spec.dtype.label, ref.spec.shape)).encode())
        if isinstance(ref.source, Slice):
            length = min(_SAMPLE, ref.stored.nbytes)
            with opened(ref.source.file) as (fd, _):
                start = ref.source.start
                total.update(pread_exactly(fd, ref.source.file, length=length, offset=start))
    return total.hexdigest()
