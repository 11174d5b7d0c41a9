"""A short mark by which a checkpoint is known again, without reading all of it."""

from __future__ import annotations

import hashlib

from dora_convert.core.bundle import Checkpoint
from dora_convert.core.tensors import Slice
from dora_convert.storage.opening import opened, pread_exactly

__all__ = ["checkpoint_mark"]

# So many pieces of so many bytes, from a tensor's first to its last.
_PIECES, _PIECE = 16, 512


def checkpoint_mark(checkpoint: Checkpoint) -> str:
    """A hash of every tensor's name, type and shape, and of a sample of its bytes.

    The sample is spread over all of the tensor. Of pickles, names and shapes alone. How
    tensors are spread over files makes no difference.
    """
    total = hashlib.sha256()
    for name, ref in sorted(checkpoint.tensors.items()):
        total.update(repr((name, ref.spec.dtype.label, ref.spec.shape)).encode())
        if isinstance(ref.source, Slice):
            with opened(ref.source.file) as (fd, _):
                for offset, length in _pieces(ref.stored.nbytes):
                    start = ref.source.start + offset
                    total.update(pread_exactly(fd, ref.source.file, length=length, offset=start))
    return total.hexdigest()


def _pieces(nbytes: int) -> list[tuple[int, int]]:
    """Offsets and lengths of the sample."""
    if nbytes <= _PIECES * _PIECE:
        return [(0, nbytes)]
    last = nbytes - _PIECE
    return [(last * i // (_PIECES - 1), _PIECE) for i in range(_PIECES)]
