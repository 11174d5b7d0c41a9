"""`push`: a finished output to the Hub, with a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dora_convert.api.cards import CARD, card_facts, named_base_of
from dora_convert.errors import InputError, OutputError
from dora_convert.hub.ahead import Ahead
from dora_convert.hub.push import (
    Changes,
    Destination,
    Pushed,
    Target,
    compared,
    look_at,
    require_writable,
    send,
)
from dora_convert.hub.refs import parse_ref
from dora_convert.hub.upload import Content
from dora_convert.report.card import figures_of, has_section, is_bare, model_card
from dora_convert.storage.documents import read_text
from dora_convert.storage.folders import require_inside, require_path
from dora_convert.storage.oserrors import reading
from dora_convert.storage.sums import SUMS, amended_sums

__all__ = [
    "Consent",
    "PushOptions",
    "add_card",
    "card_of",
    "check_names",
    "check_push",
    "files_of",
    "push",
    "require_consent",
    "text_of",
]

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
    ahead: Ahead | None = None,
) -> Pushed:
    """Send a finished output to the repository `repo` of the Hub, which is made if need be.

    A card is written there, or the one that exists completed; `base` is the base model's name on
    the Hub, by default the one that an adapter's config names. Files that are there with other
    contents are replaced, and weights that the output has not are removed, only if `consent` says
    so; a pull request asks others, so it needs none. What `ahead`, of the same repository, has sent
    while the output was made is not sent again.

    Raises InputError, OutputError without consent, HubError, and VerificationError.
    """
    how = how or PushOptions()
    check_names(repo, how)
    early = None if ahead is None else ahead.settled()
    files = files_of(folder)
    if not any(name.endswith(_WEIGHTS) for name in files):
        hint = "Push the folder that merge, to-lora or convert printed."
        raise InputError(f"{folder} holds no weights", where=str(folder), hint=hint)
    own = text_of(folder / CARD) if CARD in files else None
    target = look_at(repo, how)
    card, notes = card_of(target, folder, own, base)
    add_card(files, folder, card)
    changes = compared(target, files)
    if (changes.replaced or changes.removed) and not how.create_pr and not how.dry_run:
        require_consent(consent, repo, changes)
    origin = figures_of(own or "").get("base")
    pushed = send(target, changes, files, how, ahead=early, origin=origin, dry_run=how.dry_run)
    return replace(pushed, notes=tuple(notes))


def check_push(
    repo: str, *, how: PushOptions | None = None, consent: Consent | None = None
) -> None:
    """Raise what `push` would, as far as it can be known while there is no output yet.

    That is: no such name, no login, no right to write there, and a model there that was not made
    by this package, unless `consent` says that it may be replaced.
    """
    how = how or PushOptions()
    check_names(repo, how)
    target = look_at(repo, how)
    require_writable(target, how)
    if target.weights and not how.create_pr:
        card = target.readme()
        if card is None or not has_section(text_of(card) or ""):
            require_consent(consent, repo, Changes(replaced=target.weights))


def check_names(repo: str, how: PushOptions) -> None:
    """Raise InputError for what is no repository, and for options that exclude each other."""
    ref = parse_ref(repo)
    if ref is None or ref.revision or ref.folder or repo != ref.repo:
        raise InputError(f"{repo} is no name of a repository", hint="Write it as org/name.")
    if how.create_pr and how.revision is not None:
        raise InputError("a new pull request has no revision yet", hint="Leave --revision out.")


def files_of(folder: Path) -> dict[str, Content]:
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
    return found


def add_card(files: dict[str, Content], folder: Path, card: str) -> None:
    """Put a card among the files to be sent, and its hash into their list."""
    data = card.encode()
    files[CARD] = data
    if SUMS in files:
        files[SUMS] = amended_sums(folder, CARD, data)


def require_consent(consent: Consent | None, repo: str, changes: Changes) -> None:
    """Raise OutputError unless somebody agrees."""
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


def card_of(
    target: Target, folder: Path, own: str | None, base: str | None
) -> tuple[str, list[str]]:
    """The output's own card, or the one that is there, completed; and what it cannot say."""
    notes: list[str] = []
    existing = own
    if own is None or is_bare(own):  # then nobody's words are lost with it
        there = target.readme()
        existing = own if there is None else text_of(there) or own
    figures = figures_of(own or existing or "")
    facts = card_facts(folder, repo=target.ref.repo, figures=figures)
    written = (facts.adapter or {}).get("base_model_name_or_path")
    named = base or written or named_base_of(figures)
    ref = parse_ref(named) if isinstance(named, str) else None
    licence = target.license_of(ref.repo) if ref is not None else None
    if licence is None:
        notes.append(
            "the card names no base model: "
            + (f"{named} is not one of the Hub" if named else "pass it with --base")
        )
        if written and not base:
            notes.append(f"adapter_config.json, which is sent, names {written}")
    elif ref is not None:
        facts = replace(facts, base_model=ref.repo, license=licence)
    return model_card(facts, existing), notes


def text_of(card: Path) -> str | None:
    """A card as text; None for an empty one."""
    return read_text(card, limit=_CARD_LIMIT) if card.stat().st_size else None
