"""Merged rows into a quantisation scheme, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from dora_convert import quant
from dora_convert.core.plan import Quantise
from dora_convert.core.protocols import Folding
from dora_convert.core.quantized import QuantizedWeight, Window
from dora_convert.execution.kernels import Block, Input, Output, merged_rows, run_unit
from dora_convert.execution.lanes import Parcel
from dora_convert.execution.surveys import Surveys
from dora_convert.execution.survival import Meter
from dora_convert.execution.units import Unit
from dora_convert.maths.dora import RowFaults
from dora_convert.maths.survival import SurvivalSums
from dora_convert.storage.dtypes import TORCH

__all__ = ["do_unit", "gather_statistics", "is_surveyed", "quantise_unit", "survey_unit"]


def is_surveyed(unit: Unit) -> bool:
    """Whether the scheme needs a number of the whole tensor before any block."""
    op = unit.job.op
    return isinstance(op, Quantise) and quant.writable(op.scheme).two_pass


def survey_unit(unit: Unit, given: Input) -> list[Tensor]:
    """What the unit's blocks say of the whole, in row order, on the host."""
    op = unit.job.op
    assert isinstance(op, Quantise)
    scheme = quant.writable(op.scheme)
    multiple = scheme.row_multiple(op.weight)
    blocks = merged_rows(unit, op.base, op.pieces, given, multiple=multiple)
    found = [scheme.survey(_as_quantised(op, block.rows)) for block in blocks]
    return [part.cpu() for part in found]


def gather_statistics(
    work: Sequence[Unit], surveys: Mapping[int, list[Tensor]]
) -> dict[str, Tensor]:
    """The statistic of every surveyed tensor by name; `surveys` are those of `work`, by index.

    Tensors that the scheme fuses get one that all their rows went into, in the order of the plan.
    """
    groups: dict[tuple[str, str], list[Tensor]] = {}
    members: dict[str, tuple[str, str]] = {}
    for i, unit in enumerate(work):
        op, name = unit.job.op, unit.job.output.name
        assert isinstance(op, Quantise)
        key = members.setdefault(
            name, (op.scheme, quant.writable(op.scheme).fused(name) or f"={name}")
        )
        groups.setdefault(key, []).extend(surveys[i])
    gathered = {key: quant.writable(key[0]).gather(parts) for key, parts in groups.items()}
    return {name: gathered[key] for name, key in members.items()}


def do_unit(
    unit: Unit, out: Output, statistics: Mapping[str, Tensor], surveys: Surveys
) -> tuple[RowFaults, dict[str, SurvivalSums]]:
    """A unit of any kind; when it is over, nothing is on its way, and nothing on the device."""
    if isinstance(unit.job.op, Quantise):
        faults, sums = quantise_unit(unit, out, statistics, surveys)
    else:
        faults, sums = run_unit(unit, out), {}
    # Here, for what a device counts is of no use outside of the queue that it is counted in.
    return faults.settled(), sums


def quantise_unit(
    unit: Unit, out: Output, statistics: Mapping[str, Tensor], surveys: Surveys
) -> tuple[RowFaults, dict[str, SurvivalSums]]:
    """Write the unit's rows, with the tensor's last unit also what belongs to no row.

    Returns the rows whose result is undefined, and what is kept of every module's update.
    """
    op = unit.job.op
    assert isinstance(op, Quantise)
    scheme, weight = quant.writable(op.scheme), op.weight
    whole, seen = statistics.get(unit.job.output.name), surveys.of(unit)
    statistic = None if whole is None else whole.to(out.buffers.device)
    meter = Meter(unit, statistic, out.buffers.device)
    faults = RowFaults()
    multiple = scheme.row_multiple(weight)
    blocks = merged_rows(unit, op.base, op.pieces, out, multiple=multiple)
    with _own_scales(op, out) as scales:
        for block in blocks:
            faults += block.faults
            own = scales(block.start, block.stop)
            parts = _quantised(op, block, own, statistic)
            windows = scheme.windows(weight, block.start, block.stop)
            parcels = _parcels(out, weight, parts, windows)
            if seen is not None:
                place = _inside(seen, windows[str(scheme.surveyed)])
                survey = scheme.survey(block.rows).view(torch.uint8)
                parcels.append((survey, place.view(torch.uint8).copy_))
            out.buffers.deliver(parcels)
            for start, stop in meter.spans(block.start, block.stop):
                inside = slice(start - block.start, stop - block.start)
                meter.add(
                    start,
                    block.base[inside].to(block.rows.dtype),
                    block.rows[inside],
                    _cut(parts, windows, scheme.windows(weight, start, stop)),
                    {role: scale[inside] for role, scale in own.items()},
                )
    out.buffers.finish()
    sums = meter.sums()
    if surveys.done(unit):
        # On the host, from whatever device the rows come: one statistic gives one set of bytes.
        found = whole if seen is None else scheme.gather([seen])
        for data, put in _parcels(out, weight, scheme.constants(weight, found), {}):
            put(data)
    return faults, sums


def _inside(seen: Tensor, window: Window | None) -> Tensor:
    assert window is not None
    return seen[window.start : window.stop]


def _quantised(
    op: Quantise, block: Block, own: Mapping[str, Tensor], statistic: Tensor | None
) -> Mapping[str, Tensor]:
    """A block's parts; under the scales that the base had, times what its rows grew by."""
    scheme, rows = quant.writable(op.scheme), block.rows
    if not own:
        return scheme.quantize(
            op.weight, _as_quantised(op, rows), statistic if scheme.two_pass else None
        )
    assert isinstance(scheme, Folding)
    was = torch.linalg.vector_norm(block.base.to(rows.dtype), dim=1)
    factor = torch.where(was > 0, torch.linalg.vector_norm(rows, dim=1) / was, 1.0)
    scales = {role: scale * factor.float().unsqueeze(1) for role, scale in own.items()}
    return scheme.quantize_under(op.weight, rows.float(), scales)


@contextmanager
def _own_scales(op: Quantise, out: Output) -> Iterator[Callable[[int, int], dict[str, Tensor]]]:
    """What gives the base's of some rows, float32; a scheme that folds has some for each row."""
    with ExitStack() as stack:
        held = {role: stack.enter_context(out.reader.rows(ref)) for role, ref in op.scales.items()}

        def scales(start: int, stop: int) -> dict[str, Tensor]:
            return {
                role: blocks.fetch(start, stop, out.buffers, role).float()
                for role, blocks in held.items()
            }

        yield scales


def _as_quantised(op: Quantise, rows: Tensor) -> Tensor:
    """Untouched weights in their own type, which gives the bytes of the scheme's own library."""
    return rows.float() if op.pieces else rows.to(TORCH[op.weight.dense.dtype])


def _cut(
    parts: Mapping[str, Tensor],
    held: Mapping[str, Window | None],
    wanted: Mapping[str, Window | None],
) -> dict[str, Tensor]:
    """The windows `wanted` of parts that are the windows `held`."""
    found = {}
    for role, part in parts.items():
        have, want = held[role], wanted[role]
        assert have is not None
        assert want is not None
        found[role] = part.narrow(want.axis, want.start - have.start, want.stop - want.start)
    return found


def _parcels(
    out: Output,
    weight: QuantizedWeight,
    parts: Mapping[str, Tensor],
    windows: Mapping[str, Window | None],
) -> list[Parcel]:
    """The bytes of parts and their way into the file: to their windows, or from its beginning."""
    parcels: list[Parcel] = []
    for role, tensor in parts.items():
        spec, window = weight.parts[role], windows.get(role)
        assert tensor.dtype is TORCH[spec.dtype], (spec, tensor.dtype)
        start = 0 if window is None else window.start * spec.row_bytes
        data = tensor.contiguous().view(-1).view(torch.uint8)
        parcels.append((data, partial(out.writer.write, spec.name, start)))
    return parcels
