"""Choosing what of an adapter is used, and refusing what cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_convert.core.adapter import Adapter
from dora_convert.core.bundle import Bundle, Checkpoint
from dora_convert.core.globs import matches_any
from dora_convert.errors import InputError, MismatchError
from dora_convert.planning.families import quantization

__all__ = ["refuse_quantized", "scaled", "selected", "without"]


def without(bundle: Bundle, globs: Sequence[str]) -> Bundle:
    """The bundle less the tensors that the user says to ignore."""
    kept = {name: ref for name, ref in bundle.tensors.items() if not matches_any(name, globs)}
    return replace(bundle, tensors=kept)


def selected(adapter: Adapter, include: Sequence[str], exclude: Sequence[str]) -> Adapter:
    """The adapter with those modules only that are included (by default all) and not excluded.

    Globs match whole module paths. Raises InputError where nothing is left.
    """
    if not include and not exclude:
        return adapter
    kept = {
        path: module
        for path, module in adapter.modules.items()
        if (not include or matches_any(path, include)) and not matches_any(path, exclude)
    }
    if not kept:
        sample = next(iter(adapter.modules))
        raise InputError(
            "--include and --exclude leave no module",
            hint=f"Globs match whole paths, such as {sample}.",
        )
    left_out = len(adapter.modules) - len(kept)
    note = f"{left_out} of {len(adapter.modules)} modules left out by --include and --exclude"
    return replace(adapter, modules=kept, notes=(*adapter.notes, note))


def scaled(adapter: Adapter, strength: float) -> Adapter:
    """The adapter at another strength, as PEFT's `set_scale` has it: the update is multiplied.

    At 0 what remains is `m * W / ||W||`, which is not the base.
    """
    if strength == 1.0:
        return adapter
    modules = {
        path: replace(module, scaling=module.scaling * strength)
        for path, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises MismatchError for a base whose config says that it is quantised."""
    method = quantization(checkpoint.config)
    if method is not None:
        raise MismatchError(
            f"the base is quantised ({method}); merging needs the weights it was made from",
            where=str(checkpoint.root),
            hint="Pass the 16-bit original with --base.",
        )
