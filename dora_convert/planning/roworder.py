"""Row orders of q and k: which they are, by the base's family and by its norms, and undoing them.

torchtune keeps q and k of Llama-like models with a head's rotary pairs side by side, and takes
Qwen's as they are. Its checkpoint files are in that order throughout. Its PEFT export reorders
the rows of `lora_B` for every family and those of the magnitude for none (torchtune
`models/convert_weights.py`, `tune_to_peft_adapter_weights`; `_checkpointer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dora_convert.core.adapter import Adapter, DoraModule, MagnitudeAxis, RowOrder
from dora_convert.core.bundle import Json
from dora_convert.core.evidence import Moments, Sample, Subject, fits_better
from dora_convert.core.heads import Heads, heads, reordered
from dora_convert.errors import MismatchError
from dora_convert.planning.families import model_types, text_configs

__all__ = ["head_rows", "in_base_order", "in_order_of", "in_torchtune_order", "unclear"]

_INTERLEAVED = frozenset({"llama", "mistral", "gemma", "gemma2"})
_AS_STORED = frozenset({"qwen2", "qwen3", "phi3"})
_LEAVES = ("q_proj", "k_proj")
_SAFER = "adapter_model.pt of the same training run keeps all of it in one order: pass that file."


def head_rows(config: Json) -> int | None:
    """Rows of one attention head; None where the config does not say."""
    found = _heads(config)
    return found.dim if found is not None and found.dim % 2 == 0 else None


def unclear(found: Sequence[Subject], seen: Sequence[Sample], dim: int) -> list[Subject]:
    """Magnitudes of q and k whose order is to be measured: marked ones, and suspicious ones.

    Suspicious are those that do not go with the base's norms while other modules' do.
    """
    ours = [s for s in found if _reorderable(s, dim)]
    marked = [s for s in ours if _is_marked(s.module)]
    if marked:
        return marked
    rotary = _pooled(s for s in seen if _is_rotary(s.subject.module))
    others = _pooled(s for s in seen if not _is_rotary(s.subject.module))
    return ours if fits_better(others, rotary) else []


def in_base_order(adapter: Adapter, config: Json, evidence: Mapping[RowOrder, Moments]) -> Adapter:
    """The adapter with its q and k rows in the order of the base.

    `evidence` is empty where nothing was measured. Raises MismatchError where family and
    magnitudes contradict each other, or neither decides.
    """
    marked = {path: m for path, m in adapter.modules.items() if _is_marked(m)}
    if not marked:
        return _unmarked(adapter, config, evidence)
    pairs = {(m.up_order, m.magnitude_order) for m in marked.values()}
    both, one = (RowOrder.INTERLEAVED,) * 2, (RowOrder.SAME, RowOrder.INTERLEAVED)
    assert pairs in ({both}, {one}), pairs  # what trainers write; formats mark nothing else
    is_export = all(m.up_order is RowOrder.SAME for m in marked.values())
    interleaved = _family(config)
    seen = _seen(evidence)
    if interleaved is None:
        interleaved = seen is RowOrder.INTERLEAVED if seen is not None else None
        if interleaved is None or (is_export and not interleaved):
            raise _undecided(config, evidence)
    wanted = RowOrder.INTERLEAVED if interleaved else RowOrder.SAME
    if seen not in (None, wanted):
        if is_export and interleaved and seen is RowOrder.SAME:
            return _ordered(adapter, config, marked, RowOrder.SAME, RowOrder.SAME, _RIGHT)
        raise _undecided(config, evidence)
    if not is_export:
        note = _NATIVE if interleaved else ""
        return _ordered(adapter, config, marked, wanted, wanted, note)
    if interleaved:
        return _ordered(adapter, config, marked, RowOrder.SAME, RowOrder.INTERLEAVED, _LLAMA)
    return _ordered(adapter, config, marked, RowOrder.HALVED, RowOrder.SAME, _QWEN)


_NATIVE = "rows of {count} q and k modules put into the base's order from torchtune's"
_LLAMA = (
    "magnitudes of {count} q and k modules put into the base's order: torchtune's export reorders "
    "lora_B and forgets them"
)
_QWEN = (
    "lora_B of {count} q and k modules put back into the base's order: torchtune's export reorders "
    "it for a family whose weights are not reordered"
)
_RIGHT = "q and k magnitudes are in the base's order already: someone has set the export right"
_FOUND = (
    "magnitudes of {count} q and k modules put into the base's order, with whose norms they go "
    "then only; torchtune's export leaves them so"
)


def in_order_of(format_: str, adapter: Adapter, config: Json) -> Adapter:
    """A settled adapter with its rows as the named format has them for this base."""
    return in_torchtune_order(adapter, config) if format_ == "torchtune" else adapter


def in_torchtune_order(adapter: Adapter, config: Json) -> Adapter:
    """The inverse: settled rows as torchtune's own files for this base have them, and marked.

    Raises MismatchError for a family whose order is not known.
    """
    ours = {path: m for path, m in adapter.modules.items() if _is_rotary(m)}
    interleaved = _family(config)
    if ours and interleaved is None:
        raise MismatchError(
            f"how torchtune orders the rows of {_named(config)} is not known",
            problems=list(ours),
        )
    order = RowOrder.HALVED if interleaved else RowOrder.SAME
    moved = _ordered(adapter, config, ours, order, order, "").modules
    mark = RowOrder.INTERLEAVED
    marked = {p: replace(moved[p], up_order=mark, magnitude_order=mark) for p in ours}
    return replace(adapter, modules={**moved, **marked})


def _unmarked(adapter: Adapter, config: Json, evidence: Mapping[RowOrder, Moments]) -> Adapter:
    if _seen(evidence) is not RowOrder.INTERLEAVED:
        return adapter
    ours = {path: m for path, m in adapter.modules.items() if _is_rotary(m)}
    return _ordered(adapter, config, ours, RowOrder.SAME, RowOrder.INTERLEAVED, _FOUND)


def _ordered(
    adapter: Adapter,
    config: Json,
    chosen: Mapping[str, DoraModule],
    up: RowOrder,
    magnitude: RowOrder,
    note: str,
) -> Adapter:
    """Rows out of these orders, and the marks taken off."""
    dim = head_rows(config)
    problems: list[str] = []
    modules = dict(adapter.modules)
    for path, module in chosen.items():
        rows = module.magnitude.spec.numel if module.magnitude is not None else 0
        rows = module.delta.shape[0] if module.delta is not None else rows
        if {up, magnitude} != {RowOrder.SAME} and (dim is None or rows % dim):
            problems.append(f"{path}: {rows} rows are no whole heads of {dim or 'unknown'} rows")
            continue
        modules[path] = _turned(module, up, magnitude, dim or 0)
    if problems:
        raise MismatchError(
            "rows are to be reordered head by head, and the base's config does not fit",
            problems=problems,
            hint="Its config.json gives num_attention_heads, hidden_size and head_dim.",
        )
    told = (note.format(count=len(chosen)),) if note and chosen else ()
    return replace(adapter, modules=modules, notes=(*adapter.notes, *told))


def _turned(module: DoraModule, up: RowOrder, magnitude: RowOrder, dim: int) -> DoraModule:
    delta, vector = module.factors, module.magnitude
    if delta is not None:
        delta = replace(delta, up=reordered(delta.up, up, dim))
    if vector is not None:
        vector = reordered(vector, magnitude, dim)
    same = RowOrder.SAME
    return replace(module, delta=delta, magnitude=vector, up_order=same, magnitude_order=same)


def _family(config: Json) -> bool | None:
    """Whether torchtune keeps q and k of such a model interleaved; None where that is not known."""
    kinds = model_types(config)
    if kinds & _INTERLEAVED:
        return None if kinds & _AS_STORED else True
    return False if kinds & _AS_STORED else None


def _seen(evidence: Mapping[RowOrder, Moments]) -> RowOrder | None:
    """The order that the magnitudes alone speak for; None where they do not tell."""
    same = evidence.get(RowOrder.SAME, Moments())
    turned = evidence.get(RowOrder.INTERLEAVED, Moments())
    if fits_better(same, turned):
        return RowOrder.SAME
    return RowOrder.INTERLEAVED if fits_better(turned, same) else None


def _undecided(config: Json, evidence: Mapping[RowOrder, Moments]) -> MismatchError:
    told = ", ".join(
        f"{evidence[order].correlation:.2f} {text} (noise {evidence[order].noise:.2f})"
        for order, text in ((RowOrder.SAME, "as given"), (RowOrder.INTERLEAVED, "put in order"))
        if order in evidence
    )
    return MismatchError(
        "the order of the q and k rows of this torchtune adapter is not clear: the base is "
        f"{_named(config)}, and its norms do not fit that",
        where=f"correlation of log m with log norms: {told or 'nothing to compare'}",
        hint=_SAFER,
    )


def _named(config: Json) -> str:
    return ", ".join(sorted(model_types(config))) or "of an unknown type"


def _heads(config: Json) -> Heads | None:
    parts = (config, *(config[key] for key in text_configs(config)))
    return next((found for part in parts if (found := heads(part)) is not None), None)


def _is_marked(module: DoraModule) -> bool:
    return {module.up_order, module.magnitude_order} != {RowOrder.SAME}


def _is_rotary(module: DoraModule) -> bool:
    return module.path.rpartition(".")[2] in _LEAVES


def _reorderable(subject: Subject, dim: int) -> bool:
    module = subject.module
    usable = module.axis is MagnitudeAxis.OUT and not subject.is_transposed
    rows = module.magnitude.spec.numel if module.magnitude is not None else 0
    return usable and _is_rotary(module) and rows > 0 and rows % dim == 0


def _pooled(found: Iterable[Sample]) -> Moments:
    total = Moments()
    for sample in found:
        total += sample.moments
    return total
