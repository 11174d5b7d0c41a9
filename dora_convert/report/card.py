"""The model card of an output: metadata that the Hub reads, and what a person wants to know."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CardFacts", "figures_of", "has_section", "is_bare", "model_card"]

_BEGIN, _END = "<!-- dora-convert: begin -->", "<!-- dora-convert: end -->"
_NO_TEXT = frozenset({"true", "false", "yes", "no", "on", "off", "null"})  # in YAML 1.1
_FRONT = re.compile(r"\A---\r?\n(.*?)^---[ \t]*\r?\n?", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(rf"{_BEGIN}.*?{_END}\n?", re.DOTALL)
_ROW = re.compile(r"^\| ([^|\n-][^|\n]*) \| ([^|\n]+) \|$", re.MULTILINE)
_DIFFUSERS, _MLX = "pytorch_lora_weights.safetensors", "adapters.safetensors"
_HERE = "."  # the repository, as long as it has no name: the folder that the card lies in
_UNNAMED = "Model"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What is known of an output.

    `base_model` is its name on the Hub, never a folder; `license` what its card says of that, by
    the card's keys. `adapter` is the config of an adapter, PEFT's or another, and None for a
    checkpoint; `weights` is the file of one that is not PEFT's. `scheme` is what a checkpoint's
    weights are quantised with. `figures` are what the run that made it found out, by name.
    """

    repo: str = _HERE
    base_model: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    adapter: Mapping[str, object] | None = None
    weights: str = ""
    scheme: str | None = None
    architecture: str | None = None
    figures: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The repository's, without its owner."""
        return _UNNAMED if self.repo == _HERE else self.repo.split("/")[-1]


def figures_of(card: str) -> dict[str, str]:
    """The table in a card's section of ours, by name."""
    found = _SECTION.search(card)
    return dict(_ROW.findall(found[0])) if found is not None else {}


def has_section(card: str) -> bool:
    """Whether this package has written in a card."""
    return _SECTION.search(card) is not None


def is_bare(card: str) -> bool:
    """Whether nobody has written in a card but this package, before it knew the repository."""
    found = _FRONT.match(card)
    body = card[found.end() :] if found is not None else card
    return f"# {_UNNAMED}" == _SECTION.sub("", body, count=1).strip()


def model_card(facts: CardFacts, existing: str | None = None) -> str:
    """The text of README.md. Of a card that exists nothing is changed, but what is missing added.

    The same facts give the same text; made once more from itself it stays as it is.
    """
    existing = existing or ""
    found = _FRONT.match(existing)
    front = found[1] if found is not None else ""
    body = existing[found.end() :] if found is not None else existing
    if is_bare(existing):
        body = ""
    known = set(re.findall(r"^([A-Za-z_][\w-]*)[ \t]*:", front, re.MULTILINE))
    if "license" in known:  # the name and the link go with it
        known |= facts.license.keys()
    front += "".join(
        f"{key}: {_yaml(value)}\n" for key, value in _metadata(facts).items() if key not in known
    )
    section = f"{_BEGIN}\n{_section(facts)}\n{_END}\n"
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: section, body, count=1)
    elif body.strip():
        body = f"{body.rstrip()}\n\n{section}"
    else:
        body = f"\n# {facts.name}\n\n{section}"
    return f"---\n{front}---\n{body}"


def _yaml(value: str | list[str]) -> str:
    """JSON is YAML; plain words need no quotes."""
    if isinstance(value, list):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _NO_TEXT
    return value if plain else json.dumps(value)


def _metadata(facts: CardFacts) -> dict[str, str | list[str]]:
    found: dict[str, str | list[str]] = {}
    if facts.base_model is not None:
        found["base_model"] = facts.base_model
        found["base_model_relation"] = _relation(facts)
    tags = ["dora-convert"]
    if facts.adapter is None:
        found["library_name"] = "transformers"
        tags += ["dora", "merged", *([facts.scheme] if facts.scheme else [])]
    elif _is_peft(facts.adapter):
        found["library_name"] = "peft"
        tags += ["dora"] if facts.adapter.get("use_dora") else ["lora"]
    elif facts.weights == _DIFFUSERS:
        found["library_name"] = "diffusers"
        tags += ["lora"]
    found["tags"] = tags
    found |= facts.license
    if (facts.architecture or "").endswith("ForCausalLM"):
        found["pipeline_tag"] = "text-generation"
    return found


def _is_peft(adapter: Mapping[str, object]) -> bool:
    return "peft_type" in adapter


def _relation(facts: CardFacts) -> str:
    if facts.adapter is not None:
        return "adapter"
    return "quantized" if facts.scheme else "finetune"


def _section(facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    of = base if facts.base_model is not None else "its base model"
    rows: dict[str, str] = {}
    loading = ""
    if facts.adapter is None:
        stored = f", with weights stored as {facts.scheme}" if facts.scheme else ""
        text = f"A DoRA adapter merged into {of}{stored}: a checkpoint that loads as the base does."
        commands = [f"vllm serve {facts.repo}", *_to_gguf(facts)]
        loading = _loading(_merged_code(facts), *commands)
    elif _is_peft(facts.adapter):
        kind = "DoRA" if facts.adapter.get("use_dora") else "LoRA"
        text = f"A {kind} adapter of {of}."
        rows = _adapter_rows(facts.adapter)
        command = ""
        if kind == "LoRA" and facts.base_model is not None:
            pair = f"{facts.name}={facts.repo}"
            command = f"vllm serve {facts.base_model} --enable-lora --lora-modules {pair}"
        loading = _loading(_adapter_code(facts), command)
    else:
        text = f"An adapter of {of}, in the layout of who is to load it."
        loading = _loading_elsewhere(facts)
    # Its config says what it is; what is found out about it comes after.
    rows |= {name: value for name, value in facts.figures.items() if name not in rows}
    return "\n\n".join(part for part in (text, _table(rows), loading) if part)


def _adapter_rows(adapter: Mapping[str, object]) -> dict[str, str]:
    rows = {
        name: str(adapter[key])
        for name, key in (("rank", "r"), ("alpha", "lora_alpha"), ("task", "task_type"))
        if isinstance(adapter.get(key), int | float | str)
    }
    modules = adapter.get("target_modules")
    if isinstance(modules, list) and len(modules) <= 16:
        rows["modules"] = ", ".join(sorted(map(str, modules)))
    return rows


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _cell(text: str) -> str:
    return re.sub(r"[|\s]+", " ", text).strip() or "none"


def _loading(code: str, *commands: str) -> str:
    lines = "".join(f"$ {command}\n" for command in commands if command)
    blocks = (("python", f"{code}\n" if code else ""), ("console", lines))
    return "\n\n".join(f"```{name}\n{text}```" for name, text in blocks if text)


def _loading_elsewhere(facts: CardFacts) -> str:
    """In the program whose file it is; of other files it is not known."""
    base = facts.base_model or "BASE"
    if facts.weights == _DIFFUSERS:
        return _loading(
            "from diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{base}")\n'
            f'pipeline.load_lora_weights("{facts.repo}")'
        )
    if facts.weights == _MLX:
        command = f"mlx_lm.generate --model {base} --adapter-path {_folder(facts)}"
        return _loading("", _fetching(facts), command)
    if facts.weights.endswith(".gguf"):
        file = f"{_folder(facts)}/{facts.weights}"
        return _loading("", _fetching(facts), f"llama-cli -m BASE.gguf --lora {file}")
    return ""


def _to_gguf(facts: CardFacts) -> list[str]:
    """Commands for llama.cpp, which has a file format of its own and reads dense weights alone."""
    if facts.scheme or not (facts.architecture or "").endswith("ForCausalLM"):
        return []
    return [_fetching(facts), f"convert_hf_to_gguf.py {_folder(facts)}"]


def _folder(facts: CardFacts) -> str:
    return _HERE if facts.repo == _HERE else facts.name


def _fetching(facts: CardFacts) -> str:
    return "" if facts.repo == _HERE else f"hf download {facts.repo} --local-dir {facts.name}"


def _auto_class(facts: CardFacts) -> str:
    causal = facts.architecture is None or facts.architecture.endswith("ForCausalLM")
    return "AutoModelForCausalLM" if causal else "AutoModel"


def _merged_code(facts: CardFacts) -> str:
    auto = _auto_class(facts)
    return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{facts.repo}")'


def _adapter_code(facts: CardFacts) -> str:
    auto, base = _auto_class(facts), facts.base_model or "BASE"
    return (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{facts.repo}")'
    )
