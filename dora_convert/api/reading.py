"""What every use case begins with: the adapter read, its base found, both looked at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dora_convert.core.adapter import Adapter, MagnitudeAxis
from dora_convert.core.plan import Merge, Plan, Quantise
from dora_convert.core.protocols import AdapterFormat
from dora_convert.core.spec.format import SpecFormat
from dora_convert.core.spec.parsing import parse
from dora_convert.core.tensors import Encoded
from dora_convert.errors import InputError, MismatchError
from dora_convert.formats import detect, formats
from dora_convert.hub.locate import local_path
from dora_convert.hub.refs import parse_ref
from dora_convert.planning.checks import scaled, selected, without
from dora_convert.planning.planner import Proposal
from dora_convert.storage.bundle import open_bundle
from dora_convert.storage.documents import read_text
from dora_convert.storage.folders import require_path
from dora_convert.storage.selection import adapter_files

__all__ = [
    "ReadOptions",
    "adapter_place",
    "checked",
    "named_base",
    "named_format",
    "open_spec",
    "read_adapter",
    "worker_count",
]

_SPEC_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How adapter and base are read.

    `ignore` are globs of adapter tensors to leave out; `include` and `exclude` globs of module
    paths; `transposed` globs of modules whose weight is stored `[in, out]`; `axis` settles a
    magnitude whose format and shape do not; `scale` multiplies the update (PEFT's set_scale), or is
    the scaling itself where the trainer saved none. `format` is the adapter's format, `spec` a
    file that describes it; without either it is detected. `trained_on`: the quantisation that the
    base was loaded in for training, where the base given is the original.
    """

    allow_pickle: bool = False
    axis: MagnitudeAxis | None = None
    ignore: Sequence[str] = ()
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    transposed: Sequence[str] = ()
    scale: float | None = None
    format: str | None = None
    spec: Path | None = None
    trained_on: str | None = None


def adapter_place(path: Path, options: ReadOptions) -> Path:
    """Where the adapter's files are: `path` itself, or what is fetched for a name on the Hub.

    Raises InputError and HubError.
    """
    reader = named_format(options)
    files = reader.spec.files if isinstance(reader, SpecFormat) else ()
    return local_path(path, partial(adapter_files, globs=files))


def read_adapter(path: Path, options: ReadOptions) -> Adapter:
    """The adapter in canonical layout. Raises InputError, and HubError for one on the Hub."""
    reader = named_format(options)
    described = reader.spec if isinstance(reader, SpecFormat) else None
    files = described.files if described is not None else ()
    bundle = open_bundle(
        adapter_place(path, options),
        allow_pickle=options.allow_pickle,
        files=files,
        config=described.config if described is not None else None,
    )
    bundle = without(bundle, options.ignore)
    reader = reader or formats.get(detect(bundle))
    adapter = reader.read(bundle, axis=options.axis)
    if adapter.is_scaling_open and options.scale is None:
        raise InputError(
            f"{reader.title} does not save what the update is multiplied with",
            where=str(path),
            hint="Pass it with --scale, as it was in training; --scale 1 if it was not multiplied.",
        )
    adapter = replace(adapter, is_scaling_open=False)
    scale = 1.0 if options.scale is None else options.scale
    return scaled(selected(adapter, options.include, options.exclude), scale)


def named_format(options: ReadOptions) -> AdapterFormat | None:
    """The format that the options name or describe, if they do. Raises InputError."""
    if options.spec is not None and options.format is not None:
        raise InputError("the format is either named or described, not both")
    if options.format is not None:
        return formats.get(options.format)
    return open_spec(options.spec) if options.spec is not None else None


def open_spec(file: Path) -> SpecFormat:
    """The format that a file describes; it is called as the file is. Raises InputError."""
    require_path(file, "description of a format")
    text = read_text(file, limit=_SPEC_LIMIT)
    return SpecFormat(parse(text, name=file.stem, file=str(file)))


def checked(
    proposal: Proposal, adapter: Adapter, name: Path, base: Path, *, base_stays: bool = False
) -> list[str]:
    """Look at the data too, then raise for everything at once; returns what is only doubtful.

    `base_stays`: the base's weights will be added to as they are, so that the adapter's own copies
    of them have to be the same.
    """
    from dora_convert.execution.decoding import open_reader
    from dora_convert.execution.probe import copy_differences, fingerprint, nonfinite

    reader = open_reader()
    cores = worker_count(None)
    undefined = nonfinite(adapter, reader, workers=cores)
    problems = [*proposal.problems, *undefined]
    where = (
        f"adapter   {name}   ({adapter.format}, {len(adapter.modules)} modules)",
        f"base      {base}",
    )
    if problems:
        hint = f"The adapter was trained on {adapter.base_model}." if adapter.base_model else ""
        if undefined:
            hint = f"{hint} --exclude leaves out modules whose values are no numbers.".strip()
        raise MismatchError(
            "the adapter does not fit this base", where=where, problems=problems, hint=hint
        )
    notes = _round_trip(proposal.plan)
    mark = fingerprint(proposal.plan, reader, workers=cores)
    if mark is not None and mark.is_doubtful:
        notes.append(
            "this may not be the base that was trained on: over "
            f"{mark.rows} rows the magnitudes are {mark.deviation:.0%} off its row norms "
            f"(median; correlation {mark.correlation:.2f}), where training moves them by a few %"
        )
    different = copy_differences(adapter.modules.values(), proposal.weights, reader)
    if different and base_stays:
        raise MismatchError(
            "the adapter carries its own base weights, and the base holds others",
            where=str(name),
            problems=[f"{path}: a LoRA is added to the base's own" for path in different],
            hint="Pass the base that was trained on, or merge instead (dora-convert merge).",
        )
    if different:
        notes.append(
            "this may not be the base that was trained on: the adapter carries its own copy of "
            f"{', '.join(different)}, and the base holds other values (the copy is used)"
        )
    return notes


def _round_trip(plan: Plan) -> list[str]:
    """What the base is taken as, where it is seen through the quantisation of the training."""
    sources = (job.op.base.source for job in plan.jobs if isinstance(job.op, Merge | Quantise))
    schemes = (s.scheme for s in sources if isinstance(s, Encoded) and s.rounded)
    return [
        f"the base's linear layers are taken as {scheme} gives them back, as the adapter met them "
        "in training"
        for scheme in dict.fromkeys(schemes)
    ]


def named_base(adapter: Adapter) -> Path:
    """The base that the adapter names: a folder here, or what it is called on the Hub."""
    if adapter.base_model is None:
        raise InputError("the adapter does not name its base", hint="Pass it with --base DIR.")
    path = Path(adapter.base_model)
    if not path.exists() and parse_ref(adapter.base_model) is None:
        raise InputError(
            f"the adapter was trained on {adapter.base_model}, which is not a folder here",
            hint="Pass the base model's folder, or its name on the Hub, with --base.",
        )
    return path


def worker_count(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    # Not os.cpu_count(): a container may grant fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
