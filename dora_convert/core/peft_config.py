"""What an `adapter_config.json` in PEFT's schema says about a merge, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dora_convert.core.bundle import Json
from dora_convert.core.fields import Fields
from dora_convert.core.patterns import first_matches

__all__ = ["CONFIG", "refuse_unmergeable", "scalings", "token_indices"]

CONFIG = "adapter_config.json"

# Initialisations that leave the base alone (tuners/lora/layer.py, update_layer).
_HARMLESS = ("gaussian", "eva", "orthogonal", "mica")
# Initialisations that subtract from the base: the file alone does not say what W was.
_MUTATING = {
    "pissa": "keeps the principal part of the base in the adapter",
    "olora": "keeps a QR part of the base in the adapter",
    "corda": "keeps a part of the base, chosen from data, in the adapter",
    "lora_ga": "keeps a part of the base, chosen from gradients, in the adapter",
    "loftq": "replaces the base by a quantised one",
}
# Variants of LoRA whose forward pass is another function: no merged weight gives it.
_VARIANTS = {
    "alora_invocation_tokens": "acts on the tokens after an invocation only",
    "arrow_config": "mixes several adapters by token",
    "kasa_config": "has a diagonal between its factors",
    "monteclora_config": "draws its factors at random",
    "target_parameters": "adapts bare parameters, which are not stored as layers are",
    "use_bdlora": "has block-diagonal factors",
}


def refuse_unmergeable(config: Json, fields: Fields) -> None:
    """Reject what makes another function of the adapter, or another base of the base."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        fields.reject("peft_type", f"is {kind!r:.40}: only LORA adapters can carry DoRA")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _HARMLESS):
        name = init.lower() if isinstance(init, str) else ""
        known = [what for start, what in _MUTATING.items() if name.startswith(start)]
        what = f"which {known[0]}" if known else "which may change the base"
        fields.reject(
            "init_lora_weights",
            f"is {init!r:.40}, {what}: merging onto the original base would be wrong, and the "
            "file does not hold what would set it right",
        )
    for key, what in _VARIANTS.items():
        if fields.has(key):
            fields.reject(key, f"is set: such an adapter {what}, and cannot be merged")
    if fields.has("layer_replication"):
        fields.reject("layer_replication", "repeats layers of the base, which is not supported")
    if fields.flag("lora_bias"):
        fields.reject("lora_bias", "trains a bias of the update, which DoRA does not define")


def scalings(
    paths: Sequence[str], ranks: Mapping[str, int], fields: Fields, problems: list[str]
) -> dict[str, float]:
    """`alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA, by PEFT's own pattern rules.

    `ranks` are those of the tensors, by module path; one that the config denies is a problem.
    """
    rank, alpha = fields.count("r", 8), fields.number("lora_alpha", 8.0)
    by_rank, by_alpha = fields.counts("rank_pattern"), fields.numbers("alpha_pattern")
    rslora = fields.flag("use_rslora")
    rank_of = first_matches(by_rank, paths, where=f"{CONFIG}, rank_pattern")
    alpha_of = first_matches(by_alpha, paths, where=f"{CONFIG}, alpha_pattern")
    found = {}
    for path in paths:
        expected = by_rank[rank_of[path]] if path in rank_of else rank
        stored = ranks.get(path, expected)
        if stored != expected:
            key = f"rank_pattern[{rank_of[path]!r:.80}]" if path in rank_of else "r"
            problems.append(
                f"{path}: {CONFIG} says rank {expected} ({key}), the tensors have rank {stored}"
            )
        size = by_alpha[alpha_of[path]] if path in alpha_of else alpha
        found[path] = size / (math.sqrt(expected) if rslora else expected)
    return found


def token_indices(path: str, value: object) -> tuple[int, ...] | None:
    """`trainable_token_indices` for an embedding, a list or lists by name; None if unusable."""
    if isinstance(value, dict):
        value = next((v for k, v in value.items() if path == k or path.endswith(f".{k}")), None)
    if not isinstance(value, list):
        return None
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return None
    return tuple(value)
