"""Merged rows into a quantisation scheme, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_convert import quant
from dora_convert.core.plan import Quantise
from dora_convert.core.protocols import Folding
from dora_convert.core.tensors import TensorSpec
from dora_convert.execution.kernels import Input, Output, merged_rows
from dora_convert.execution.survival import Meter
from dora_convert.execution.units import Unit
from dora_convert.maths.dora import RowFaults
from dora_convert.maths.survival import SurvivalSums
from dora_convert.storage.dtypes import TORCH

__all__ = ["gather_statistics", "is_surveyed", "quantise_unit", "survey_unit"]


def is_surveyed(unit: Unit) -> bool:
    """Whether the scheme needs a number of the whole tensor."""
    op = unit.job.op
    return isinstance(op, Quantise) and quant.writable(op.scheme).surveys


def survey_unit(unit: Unit, given: Input) -> list[Tensor]:
    """What the unit's blocks say of the whole, in row order."""
    op = unit.job.op
    assert isinstance(op, Quantise)
    scheme = quant.writable(op.scheme)
    multiple = scheme.row_multiple(op.weight)
    rows = merged_rows(unit, op.base, op.pieces, given, multiple=multiple)
    return [scheme.survey(_as_quantised(op, block)) for _, _, block, _ in rows]


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


def quantise_unit(
    unit: Unit, out: Output, statistics: Mapping[str, Tensor]
) -> tuple[RowFaults, dict[str, SurvivalSums]]:
    """Write the unit's rows, with the first also what belongs to no row.

    Returns the rows whose result is undefined, and what is kept of every module's update.
    """
    op = unit.job.op
    assert isinstance(op, Quantise)
    scheme, weight = quant.writable(op.scheme), op.weight
    statistic = statistics.get(unit.job.output.name)
    constants = scheme.constants(weight, statistic)
    faults = RowFaults()
    meter = Meter(op, constants, statistic)
    multiple = scheme.row_multiple(weight)
    blocks = merged_rows(unit, op.base, op.pieces, out, multiple=multiple)
    with out.reader.rows(op.base) as base:
        for i, (start, stop, rows, fault) in enumerate(blocks):
            faults += fault
            measured = meter.wants(i, start, stop)
            before, own = None, {}
            if measured or op.scales:
                # Read once more: where the block was, the merged one is now.
                raw = out.buffers.take("base", op.base.spec.row_bytes * (stop - start))
                before = base.read(start, stop, raw).to(rows.dtype)
                own = _own_scales(op, start, stop, out)
            parts = _quantised(op, rows, before, own, statistic)
            windows = scheme.windows(weight, start, stop)
            for role, tensor in parts.items():
                window = windows[role]
                assert window is not None
                _write(out, weight.parts[role], window.start, tensor)
            if measured and before is not None:
                meter.add(start, before, rows, parts, own)
    if unit.start == 0:
        for role, tensor in constants.items():
            _write(out, weight.parts[role], 0, tensor)
    return faults, meter.sums


def _quantised(
    op: Quantise,
    rows: Tensor,
    before: Tensor | None,
    own: Mapping[str, Tensor],
    statistic: Tensor | None,
) -> Mapping[str, Tensor]:
    """A block's parts; under the scales that the base had, times what its rows grew by."""
    scheme = quant.writable(op.scheme)
    if before is None or not own:
        return scheme.quantize(
            op.weight, _as_quantised(op, rows), statistic if scheme.two_pass else None
        )
    assert isinstance(scheme, Folding)
    was = torch.linalg.vector_norm(before, dim=1)
    factor = torch.where(was > 0, torch.linalg.vector_norm(rows, dim=1) / was, 1.0)
    scales = {role: scale * factor.float().unsqueeze(1) for role, scale in own.items()}
    return scheme.quantize_under(op.weight, rows.float(), scales)


def _own_scales(op: Quantise, start: int, stop: int, out: Output) -> dict[str, Tensor]:
    """The base's, float32; a scheme that folds has one or more for each row."""
    return {role: out.reader.load_rows(ref, start, stop).float() for role, ref in op.scales.items()}


def _as_quantised(op: Quantise, rows: Tensor) -> Tensor:
    """Untouched weights in their own type, which gives the bytes of the scheme's own library."""
    return rows.float() if op.pieces else rows.to(TORCH[op.weight.dense.dtype])


def _write(out: Output, part: TensorSpec, start: int, tensor: Tensor) -> None:
    assert tensor.dtype is TORCH[part.dtype], (part, tensor.dtype)
    data = tensor.contiguous().view(-1).view(torch.uint8)
    out.writer.write(part.name, start * part.row_bytes, data)
