"""`convert`: the same adapter in another trainer's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dora_convert.api.bases import open_base
from dora_convert.api.cards import CARD, adapter_name, write_card
from dora_convert.api.merging import Silent
from dora_convert.api.reading import ReadOptions, open_spec, read_adapter
from dora_convert.api.settling import settled
from dora_convert.core.adapter import Adapter, BiasRule
from dora_convert.core.bundle import Checkpoint, json_text
from dora_convert.core.plan import Cast, Copy, Job, Plan, Shard, WrittenFile
from dora_convert.core.reports import ConvertReport
from dora_convert.core.tensors import DType, TensorRef
from dora_convert.errors import InputError, MismatchError, VerificationError
from dora_convert.formats import formats
from dora_convert.planning.roworder import in_order_of
from dora_convert.planning.settle import with_bias_rule
from dora_convert.storage.fingerprint import inputs_of
from dora_convert.storage.sidefiles import write_documents
from dora_convert.storage.single import say_in_header
from dora_convert.storage.sparse import released
from dora_convert.storage.staging import Staging, check_output
from dora_convert.storage.sums import SUMS, write_sums
from dora_convert.storage.weights import PICKLES

__all__ = ["ConvertOptions", "convert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What to write: `format` is a format's name, or a file that describes one.

    `dtype`: element type of all floats, by default each tensor's own.
    """

    format: str
    dtype: DType | None = None
    overwrite: bool = False


@released()
def convert(
    adapter: Path,
    output: Path,
    *,
    base: Path | None = None,
    options: ReadOptions | None = None,
    how: ConvertOptions,
) -> ConvertReport:
    """Write `adapter` in the layout `how.format`, its values as they are.

    A base is needed only where it alone decides: the axis of square magnitudes, the order of rows
    by attention heads, whether there is a bias that a trainer scaled.

    Raises InputError for what the layout cannot hold, MismatchError, OutputError, and
    VerificationError where what was written does not read back the same.
    """
    described = how.format.endswith(".toml")
    target = open_spec(Path(how.format)) if described else formats.get(how.format)
    options = options or ReadOptions()
    found = read_adapter(adapter, options)
    inputs = (adapter,) if base is None else (adapter, base)
    check_output(output, inputs=inputs, overwrite=how.overwrite)
    if base is not None:
        checkpoint = open_base(base, options, in_part=True)
        is_of_images = found.is_place_open
        found = settled(found, checkpoint, transposed=options.transposed)
        if is_of_images:
            _require_whole(found, checkpoint, base)
        found = with_bias_rule(found, checkpoint, BiasRule.NONE)
        found = in_order_of(how.format, found, checkpoint.config)
    if not found.modules:
        raise InputError("the adapter has no module", where=str(adapter))
    made = target.write(found)
    jobs = tuple(_job(name, ref, how.dtype) for name, ref in made.tensors.items())
    texts = (WrittenFile(n, json_text(made.documents[n])) for n in sorted(made.documents))
    plan = Plan((Shard(target.weights, jobs),), tuple(texts), found.notes)
    read = inputs_of(plan)
    with Staging(output, nbytes=plan.nbytes, overwrite=how.overwrite) as staging:
        _write(plan, staging.dir, made.metadata)
        write_documents(plan.documents, staging.dir)
        write_card(staging.dir, {"converted from": found.format, "adapter": adapter_name(found)})
        write_sums(staging.dir, {})
        read.require_unchanged()
        staging.publish()
    return ConvertReport(
        output=str(output),
        adapter=str(adapter),
        source=found.format,
        format=how.format,
        modules=len(found.modules),
        tensors=len(jobs),
        nbytes=plan.nbytes,
        files=(target.weights, *sorted((CARD, SUMS, *made.documents))),
        notes=found.notes,
    )


def _require_whole(adapter: Adapter, checkpoint: Checkpoint, base: Path) -> None:
    """Every module is one of the base's, and not made of the rows of others."""
    parts = [path for path in adapter.modules if f"{path}.weight" not in checkpoint.tensors]
    if parts:
        raise MismatchError(
            "modules of the adapter are cut or fused in this base, and have no place in another "
            "layout for it",
            where=f"base      {base}",
            problems=parts,
            hint="Give a base in the names that the adapter was trained with.",
        )


def _job(name: str, ref: TensorRef, dtype: DType | None) -> Job:
    kind = dtype if dtype is not None and ref.spec.dtype.is_weight else ref.spec.dtype
    op = Copy(ref) if kind is ref.spec.dtype else Cast(ref)
    return Job(op, replace(ref.spec, name=name, dtype=kind))


def _write(plan: Plan, folder: Path, metadata: Mapping[str, str]) -> None:
    """The weights, and a second look at every byte of them by another reader.

    `metadata` is what a format has to say in the header of the file.
    """
    from dora_convert.execution.run import run
    from dora_convert.execution.verify import verify
    from dora_convert.storage.pickled import save_pickle

    (shard,) = plan.shards
    pickled = Path(shard.file).suffix in PICKLES
    name = "weights.safetensors" if pickled else shard.file
    run(replace(plan, shards=(replace(shard, file=name),)), folder, workers=1, listener=Silent())
    if metadata:
        say_in_header(folder / name, metadata)
    result = verify(plan, {spec.name: folder / name for spec in shard.specs}, samples=None)
    if result.differences:
        raise VerificationError(
            "the result does not read back as it was to be; it was discarded",
            problems=result.differences,
            hint="This is a bug, or a fault of disk or memory: please report it.",
        )
    if pickled:
        save_pickle(folder / name, folder / shard.file)
        (folder / name).unlink()
