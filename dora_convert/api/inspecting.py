"""`inspect`: what an adapter is and does."""

from __future__ import annotations

from pathlib import Path

from dora_convert.api.measuring import matched, measured
from dora_convert.api.plotting import cells, check_picture, save_picture
from dora_convert.api.reading import ReadOptions, read_adapter
from dora_convert.core.reports import Inspection
from dora_convert.errors import InputError
from dora_convert.planning.settle import open_questions
from dora_convert.report.inspection import inspection
from dora_convert.storage.sparse import released

__all__ = ["inspect"]


@released()
def inspect(
    adapter: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    per_module: bool = False,
    picture: Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Inspection:
    """What an adapter is; with a base, whether it fits and how far it moves every module.

    Without a base only headers are read. `picture`: a file to draw the movement in, as `plot` does.
    Raises InputError, MismatchError if it does not fit, and OutputError.
    """
    options = options or ReadOptions()
    if picture is not None:
        check_picture(picture, overwrite=overwrite)
    found = read_adapter(adapter, options)
    if base is None:
        if picture is not None:
            what = "a picture shows what the adapter does to its base, and none is given"
            raise InputError(what, hint="Pass it with --base.")
        notes = open_questions(found)
        return inspection(found, name=str(adapter), per_module=per_module, notes=notes)
    match = matched(found, adapter, base, options)
    measures = measured(match.plan, workers)
    if picture is not None:
        save_picture(picture, "movement", cells(measures), adapter, match.base)
    notes = [*match.plan.notes, *match.notes, *measures.notes]
    return inspection(
        match.adapter,
        name=str(adapter),
        base=match.base,
        measure=measures.figures,
        per_module=per_module,
        notes=[note for note in notes if note not in match.adapter.notes],
    )
