"""Write dora_convert/planning/names.json from the installed transformers.

Two tables. `rules`: transformers' renames and conversions at load time by model type or class name.
`classes`: which model classes sit where inside which, since a class's rules hold below it only.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

TARGET = Path(__file__).parent.parent / "dora_convert" / "planning" / "names.json"
# Factories by which a composite builds a part whose class depends on that part's config.
FACTORIES = {
    "base": "MODEL_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "backbone": "MODEL_FOR_BACKBONE_MAPPING_NAMES",
    "encoder": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vlm": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers")
MORE_DEPTHS = ("decoder_layers", "vision_layers", "num_encoder_layers", "num_decoder_layers")
# Where the default config builds nothing, or only with a package that is not needed here.
_RESNET: dict[str, Any] = {
    "use_timm_backbone": False,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "conditional_detr": _RESNET,
    "detr": _RESNET,
    "emu3": {"vocabulary_map": {"<image>": 0}},
}


def rule(transform: Any) -> dict[str, Any]:
    """One transform as data; its regular expression has a group `gN` for its Nth source."""
    out: dict[str, Any] = {"find": transform.compiled_sources.pattern}
    out["put"] = list(transform.target_patterns)
    if type(transform).__name__ == "GroupWeightRename":
        out["paired"] = True
    if hasattr(transform, "offset"):
        out["offset"] = transform.offset
    if isinstance(transform, WeightConverter):
        out["sources"] = list(transform.source_patterns)
        out["operations"] = [{"name": type(op).__name__, **vars(op)} for op in transform.operations]
    return out


def rules() -> dict[str, Any]:
    """All entries; one that equals another is that one's name."""
    written: dict[str, str] = {}
    out: dict[str, Any] = {}
    mapping = conversion_mapping._build_checkpoint_conversion_mapping()
    for name, transforms in sorted(mapping.items()):
        entry = [rule(transform) for transform in transforms]
        key = json.dumps(entry)
        out[name] = written.get(key, entry)
        written.setdefault(key, name)
    return out


def factories() -> dict[str, dict[str, str]]:
    """Model type to class name, by factory."""
    out = {}
    for kind, table in FACTORIES.items():
        names = getattr(modeling_auto, table).items()
        out[kind] = {key: name if isinstance(name, str) else name[0] for key, name in names}
    return out


def sections(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """Walk the config and all those inside it, by dotted key."""
    yield path, config
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from sections(value, f"{path}.{key}".lstrip("."))


def shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    """Give the config one layer where it can say so."""
    for _, section in sections(config):
        for key in (*DEPTHS, *MORE_DEPTHS):
            if isinstance(getattr(section, key, None), int):
                setattr(section, key, 1)
        if isinstance(getattr(section, "layer_types", None), list):
            section.layer_types = section.layer_types[:1]
    return config


def build(cls: type[PreTrainedModel]) -> PreTrainedModel | None:
    """Build the model without weights; None where the class needs more than its default config."""
    settings = SETTINGS.get(cls.config_class.model_type, {})
    for prepare in (shallow, lambda config: config):
        try:
            with torch.device("meta"), no_init_weights():
                return cls(prepare(cls.config_class(**settings)))
        except Exception:
            continue
    return None


def parts(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Model parts nearest to the root, with their paths."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or not isinstance(module, PreTrainedModel):
            continue
        if not any(path.startswith(f"{above}.") for above in found):
            found.append(path)
            yield path, module


def describe(model: PreTrainedModel, made_by: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Model type, prefix of the base model, and parts: path, class, config key, factory."""
    where = {id(section): path for path, section in reversed(list(sections(model.config)))}
    out = []
    for path, part in parts(model):
        name, kind = type(part).__name__, part.config.model_type
        section = where.get(id(part.config))
        factory = next((f for f, table in made_by.items() if table.get(kind) == name), None)
        out.append([path, name, section, factory if section else None])
    return {
        "type": model.config.model_type,
        "prefix": model.base_model_prefix,
        "parts": out,
    }


def model_classes() -> Iterator[type[PreTrainedModel]]:
    """Every model class that transformers exports."""
    for name in sorted(dir(transformers)):
        if name.endswith(("Config", "Tokenizer", "Processor", "Fast", "PreTrainedModel")):
            continue
        try:
            value = getattr(transformers, name)
        except Exception:  # needs a package that is not there
            continue
        is_model = inspect.isclass(value) and issubclass(value, PreTrainedModel)
        if is_model and inspect.isclass(value.config_class):
            yield value


def classes(known: dict[str, Any], made_by: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Classes that rules hold for, or may, by what their parts are configured to be."""
    out: dict[str, Any] = {}
    waiting = [model for model in map(build, model_classes()) if model is not None]
    for model in waiting:  # grows; whole models first, as a part may be under a foreign config
        if type(model).__name__ not in out:
            out[type(model).__name__] = describe(model, made_by)
            waiting.extend(part for _, part in parts(model))
    return prune(out, known)


def prune(table: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Drop what no rule can reach."""
    kept = {name for name, entry in table.items() if name in known or entry["type"] in known}
    size = -1
    while size != len(kept):
        size = len(kept)
        kept |= {
            name
            for name, entry in table.items()
            if any(part[1] in kept or part[3] for part in entry["parts"])
        }
    return {
        name: {**entry, "parts": [p for p in entry["parts"] if p[1] in kept or p[3]]}
        for name, entry in sorted(table.items())
        if name in kept
    }


def main(target: Path) -> None:
    """Write the file, one entry a line."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    known, made_by = rules(), factories()
    table = classes(known, made_by)
    made_by = {
        kind: {key: name for key, name in sorted(names.items()) if name in table or name in known}
        for kind, names in made_by.items()
    }
    groups = {"rules": known, "classes": table, "factories": made_by}
    lines = [f'"transformers": {json.dumps(transformers.__version__)}']
    for group, entries in groups.items():
        rows = [
            f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}"
            for key, value in entries.items()
        ]
        lines.append(f'"{group}": {{\n' + ",\n".join(rows) + "\n}")
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
