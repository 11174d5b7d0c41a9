"""`push`: a finished output to the Hub, with a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_convert.core.bundle import Json
from dora_convert.errors import InputError, OutputError
from dora_convert.hub.push import (
    Changes,
    Content,
    Destination,
    Pushed,
    Target,
    compared,
    look_at,
    send,
)
from dora_convert.hub.refs import parse_ref
from dora_convert.report.card import CardFacts, model_card
from dora_convert.storage.documents import read_json, read_text
from dora_convert.storage.folders import require_inside, require_path
from dora_convert.storage.oserrors import reading

__all__ = ["Consent", "PushOptions", "push"]

_CARD = "README.md"
_CARD_LIMIT = 1 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")

Consent = Callable[[Changes], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions(Destination):
    """Where a push goes; `dry_run` changes nothing there."""

    dry_run: bool = False


def push(
    folder: Path,
    repo: str,
    *,
    base: str | None = None,
    how: PushOptions | None = None,
    consent: Consent | None = None,
) -> Pushed:
    """Send a finished output to the repository `repo` of the Hub, which is made if need be.

    A card is written there, or the one that exists completed; `base` is the base model's name on
    the Hub, by default the one that an adapter's config names. Files that are there with other
    contents are replaced, and weights that the output has not are removed, only if `consent` says
    so; a pull request asks others, so it needs none.

    Raises InputError, OutputError without consent, HubError, and VerificationError.
    """
    how = how or PushOptions()
    ref = parse_ref(repo)
    if ref is None or ref.revision or ref.folder or repo != ref.repo:
        raise InputError(f"{repo} is no name of a repository", hint="Write it as org/name.")
    if how.create_pr and how.revision is not None:
        raise InputError("a new pull request has no revision yet", hint="Leave --revision out.")
    files = _files(folder)
    documents: dict[str, Json] = {
        name: read_json(folder / name)
        for name in ("config.json", "adapter_config.json")
        if name in files
    }
    target = look_at(repo, how)
    notes: list[str] = []
    files[_CARD] = _card(target, files, documents, base, notes).encode()
    changes = compared(target, files)
    if (changes.replaced or changes.removed) and not how.create_pr and not how.dry_run:
        _require(consent, repo, changes)
    pushed = send(target, changes, files, how, dry_run=how.dry_run)
    return replace(pushed, notes=tuple(notes))


def _files(folder: Path) -> dict[str, Content]:
    """All files of an output, but for hidden ones."""
    require_path(folder, "folder")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder", where=str(folder))
    found: dict[str, Content] = {}
    with reading(folder):
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                require_inside(folder, file)
                found[name.as_posix()] = file
    if not any(name.endswith(_WEIGHTS) for name in found):
        hint = "Push the folder that merge, to-lora or convert printed."
        raise InputError(f"{folder} holds no weights", where=str(folder), hint=hint)
    return found


def _require(consent: Consent | None, repo: str, changes: Changes) -> None:
    if consent is not None and consent(changes):
        return
    raise OutputError(
        f"{repo} holds another model, or another version of it",
        problems=[
            *(f"{name} would be replaced" for name in changes.replaced),
            *(f"{name} would be removed" for name in changes.removed),
        ],
        hint="Pass --yes to do so, --create-pr to propose it, or push to another --revision.",
    )


def _card(
    target: Target,
    files: Mapping[str, Content],
    documents: Mapping[str, Json],
    base: str | None,
    notes: list[str],
) -> str:
    own = files.get(_CARD)
    existing = own if isinstance(own, Path) else target.readme()
    text = read_text(existing, limit=_CARD_LIMIT) if existing and existing.stat().st_size else None
    config = documents.get("config.json", {})
    # Some trainers' adapters have no config at all.
    adapter = documents.get("adapter_config.json", None if config else {})
    named = base or (adapter or {}).get("base_model_name_or_path")
    ref = parse_ref(named) if isinstance(named, str) else None
    licence = target.license_of(ref.repo) if ref is not None else None
    if licence is None:
        notes.append(
            "the card names no base model: "
            + (f"{named} is not one of the Hub" if named else "pass it with --base")
        )
        if named and not base:
            notes.append(f"adapter_config.json, which is sent, names {named}")
    classes: Any = config.get("architectures")
    quantization: Any = config.get("quantization_config")
    facts = CardFacts(
        repo=target.ref.repo,
        base_model=ref.repo if ref is not None and licence is not None else None,
        license=licence or {},
        adapter=adapter,
        scheme=str(quantization.get("quant_method")) if isinstance(quantization, dict) else None,
        architecture=str(classes[0]) if isinstance(classes, list) and classes else None,
    )
    return model_card(facts, text)
