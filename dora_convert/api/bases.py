"""The base model, as dense weights whatever it is stored in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dora_convert.api.reading import ReadOptions
from dora_convert.core.bundle import Checkpoint
from dora_convert.core.plan import Merge, Plan
from dora_convert.core.tensors import TensorRef
from dora_convert.hub.locate import local_path
from dora_convert.planning.families import quantization, transposed_modules
from dora_convert.storage.origin import identity
from dora_convert.storage.pipeline import open_model
from dora_convert.storage.selection import base_files
from dora_convert.storage.sparse import fill

__all__ = ["base_name", "fetch_merged", "fetch_rows", "open_base"]

_SMALL = 1 << 10  # bytes of a tensor that says how others are to be decoded


def open_base(path: Path, options: ReadOptions, *, in_part: bool = False) -> Checkpoint:
    """Headers and config; the weights of a quantised base stand for what they decode to.

    With `trained_on`, those of a dense one stand for what they were in training. Of a base on the
    Hub that is not in the cache only what is read is fetched if `in_part`, and not for longer than
    what is `released` around this. Raises InputError, also for a quantisation that is not known,
    and HubError.
    """
    place = local_path(path, base_files, in_part=in_part)
    checkpoint = open_model(place, allow_pickle=options.allow_pickle)
    if quantization(checkpoint.config) is not None:
        from dora_convert.execution.decoding import decoded

        small = [ref for ref in checkpoint.tensors.values() if ref.stored.nbytes <= _SMALL]
        fill(part.span for ref in small for part in ref.slices)
        checkpoint = decoded(checkpoint)
    return checkpoint if options.trained_on is None else _as_trained(checkpoint, options)


def _as_trained(checkpoint: Checkpoint, options: ReadOptions) -> Checkpoint:
    from dora_convert.execution.decoding import as_trained

    assert options.trained_on is not None
    transposed = transposed_modules(checkpoint.config, options.transposed)
    return as_trained(checkpoint, options.trained_on, transposed=transposed)


def base_name(checkpoint: Checkpoint, given: Path) -> str:
    """What a report calls the base: `org/name@commit` if it is one of the Hub, else as given."""
    return identity(checkpoint.root) or str(given)


def fetch_merged(plan: Plan) -> None:
    """Bring at once what merging will read of a base that is read in part; else do nothing."""
    fetch_rows(
        (op.base, piece.start, piece.stop)
        for op in (job.op for job in plan.jobs)
        if isinstance(op, Merge)
        for piece in op.pieces
    )


def fetch_rows(wanted: Iterable[tuple[TensorRef, int, int]]) -> None:
    """The same for rows `start:stop` of some weights."""
    fill(span for ref, start, stop in wanted for span in _spans(ref, start, stop))


def _spans(ref: TensorRef, start: int, stop: int) -> list[tuple[Path, int, int]]:
    """Where these rows lie: file, begin, end. All of a tensor whose rows lie apart, or decoded."""
    rows = ref.row_span(start, stop)
    return [part.span for part in ref.slices] if rows is None else [rows]
