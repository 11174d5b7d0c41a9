"""The card of every output: what it is, what it was made of, and what its run found out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_convert.api.outcome import pooled, pooled_weighted
from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Json
from dora_convert.core.lora import FitReport, LoraModule
from dora_convert.core.plan import Merge, Plan, Quantise, WrittenFile
from dora_convert.core.reports import Residual, Survival, Verification
from dora_convert.core.tensors import Encoded, Pickled, Slice, TensorRef
from dora_convert.report.card import CardFacts, model_card
from dora_convert.storage.documents import read_json
from dora_convert.storage.origin import identity
from dora_convert.storage.sidefiles import write_documents

__all__ = [
    "CARD",
    "adapter_name",
    "card_facts",
    "lora_figures",
    "merge_figures",
    "named_base_of",
    "write_card",
]

CARD = "README.md"

_WEIGHTS = frozenset({".safetensors", ".gguf"})
_DOCUMENTS = ("config.json", "adapter_config.json")


def write_card(folder: Path, figures: Mapping[str, str]) -> None:
    """Put a card into a finished output; `figures` are those of the functions below.

    Of the machine nothing is told: no path, no time. The base has a name only if it is one of the
    Hub; else `push` finds it out, and the licence.
    """
    figures = {name: text for name, text in figures.items() if text}
    facts = card_facts(folder, base_model=named_base_of(figures), figures=figures)
    write_documents([WrittenFile(CARD, model_card(facts))], folder)


def named_base_of(figures: Mapping[str, str]) -> str | None:
    """The base's repository, if it was one of the Hub."""
    return figures.get("base", "").partition("@")[0] or None


def card_facts(folder: Path, *, figures: Mapping[str, str], **known: Any) -> CardFacts:
    """What the documents of an output say; `known` is all else. Raises InputError."""
    documents: dict[str, Json] = {
        name: read_json(folder / name) for name in _DOCUMENTS if (folder / name).is_file()
    }
    config = documents.get("config.json", {})
    # Some trainers' adapters have no config at all.
    adapter = documents.get("adapter_config.json", None if config else {})
    classes: Any = config.get("architectures")
    quantization: Any = config.get("quantization_config")
    files = sorted(file.name for file in folder.glob("*") if file.suffix in _WEIGHTS)
    return CardFacts(
        adapter=adapter,
        weights=files[0] if files and adapter is not None else "",
        scheme=str(quantization.get("quant_method")) if isinstance(quantization, dict) else None,
        architecture=str(classes[0]) if isinstance(classes, list) and classes else None,
        figures=figures,
        **known,
    )


def merge_figures(
    plan: Plan,
    verification: Verification | None,
    survival: Survival | None,
    residual: Residual | None,
) -> dict[str, str]:
    """What a merge found out, as text by name."""
    ops = [job.op for job in plan.jobs if isinstance(job.op, Merge | Quantise)]
    pieces = [piece for op in ops for piece in op.pieces]
    factors = (p.module.delta.tensors[-1] for p in pieces if p.module.delta is not None)
    figures = {
        "base": _named([op.base for op in ops]),
        "adapter": _named(list(factors)),
        "modules merged": str(len({piece.module.path for piece in pieces})),
    }
    if survival is not None:
        total = survival.total
        figures[f"kept by the {survival.scheme} grid"] = f"{total.kept:.1%} of the update"
        figures["noise of the grid"] = f"{total.noise:.2f} times the update"
    if residual is not None:
        kept = f"{residual.total.corrected_kept:.1%} of the update"
        figures["with the LoRA beside it"] = f"{kept}, at rank {residual.rank}"
    if verification is not None:
        count = f"{verification.rows} rows of {verification.modules} modules"
        figures["recomputed in float64"] = count
        if verification.rounding is not None:
            figures["lost by rounding"] = f"{verification.rounding.loss:.2%} of the update"
    return figures


def lora_figures(
    adapter: Adapter, base: Path, modules: Sequence[LoraModule], fit: FitReport | None
) -> dict[str, str]:
    """What `to-lora` found out, as text by name. Residuals are ||T - BA|| / ||T||, Frobenius."""
    residual = pooled(modules, [module.residual for module in modules])
    dropped = pooled(modules, [module.without_magnitude for module in modules])
    weighted = pooled_weighted(modules)
    figures = {
        "base": identity(base) or "",
        "adapter": adapter_name(adapter),
        "misses": f"{residual:.2%} of the adapter's update",
        "without the magnitude": f"{dropped:.2%} would be missed",
    }
    if weighted is not None:
        figures["misses, weighted"] = f"{weighted:.2%} of the effect on the outputs"
    if fit is not None and fit.best_step:
        figures["fitted"] = f"hidden states {fit.after:.2%} off the DoRA's, {fit.before:.2%} before"
    return figures


def adapter_name(adapter: Adapter) -> str:
    """`org/name@commit` of an adapter of the Hub, else nothing."""
    modules = adapter.modules.values()
    return _named([m.delta.tensors[-1] if m.delta else m.magnitude for m in modules])


def _named(refs: Sequence[TensorRef | None]) -> str:
    """The commit that the first is from, if it is one of the Hub."""
    for source in (ref.source for ref in refs if ref is not None):
        if isinstance(source, Encoded):
            return _named(list(source.parts.values()))
        if isinstance(source, Slice | Pickled):
            return identity(source.file) or ""
    return ""
