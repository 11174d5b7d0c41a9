"""What the Hub's client raises, as one sentence and what to do. The only place that knows both."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING

from dora_convert.errors import DoraConvertError, HubError, InputError, OutputError

if TYPE_CHECKING:
    from dora_convert.hub.refs import Ref

__all__ = ["is_broken_line", "is_passing", "translated"]

_LOGIN = "Log in with hf auth login, or set HF_TOKEN."


def is_passing(error: Exception) -> bool:
    """Whether the same request may go well a moment later, for the fault was the Hub's."""
    return _status(error) >= 500


def is_broken_line(error: Exception) -> bool:
    """Whether the line, not the Hub, is at fault.

    By name, since the client's HTTP library has changed before; it is no OSError.
    """
    names = {"TransportError", "RevisionResolutionError", "LocalEntryNotFoundError"}
    kinds = {kind.__name__ for cause in _chain(error) for kind in type(cause).__mro__}
    return bool(kinds & (names | {"ConnectionError", "TimeoutError", "XetDownloadError"}))


def translated(
    error: Exception, ref: Ref, *, has_token: bool, endpoint: str
) -> DoraConvertError | None:
    """The error to raise instead; None for what the Hub has nothing to do with.

    Of the answer only the status is told: its text is the server's, and could hold anything.
    """
    from huggingface_hub import errors  # noqa: PLC0415 - only where a ref needs it

    where = f"{endpoint}/{ref.repo}"
    # Gated before not found: it is one of those.
    if isinstance(error, errors.GatedRepoError):
        hint = f"Accept its terms at {where}, with the account that you are logged in with."
        what = f"{ref.repo} is gated: its owner grants access"
        return HubError(what, where=where, hint=hint if has_token else f"{hint} {_LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        seen = "the token that was sent has no access" if has_token else "no token was sent"
        return HubError(
            f"there is no model {ref.repo} on the Hub, or it is private and {seen}",
            where=where,
            hint=f"Check the name; a folder is taken if it exists. {'' if has_token else _LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{ref.repo} has no revision {ref.revision or 'main'}", where=where)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"a file of {ref} is not on the Hub any more", where=where, hint=_AGAIN)
    if _is_offline(error):
        return HubError(
            f"{ref} is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub",
            hint="Unset HF_HUB_OFFLINE, or download it first where there is a network.",
        )
    return (
        _by_value(error, ref, where) or _by_status(error, ref, where) or _by_line(error, ref, where)
    )


_AGAIN = "Run the command again."
_ANSWERS = {
    401: (
        "the Hub does not accept the token that was sent",
        "Make a new one at {host}/settings/tokens, and log in with it or set HF_TOKEN.",
    ),
    403: (
        "the token that was sent may not do this with {ref}",
        "It needs the right to write there; push --create-pr proposes changes to others.",
    ),
    409: ("{ref} is being changed by another push", _AGAIN),
    412: ("{ref} was changed on the Hub meanwhile; nothing was pushed", _AGAIN),
    413: ("the Hub refuses files of this size", "Write smaller shards."),
    429: ("the Hub has had too many requests", "Wait a few minutes, and run the command again."),
}


def _by_status(error: Exception, ref: Ref, where: str) -> DoraConvertError | None:
    status = _status(error)
    if not status:
        return None
    if status >= 500:
        return HubError(f"the Hub is out of order (status {status})", where=where, hint=_AGAIN)
    what, hint = _ANSWERS.get(status, (f"the Hub refused {{ref}} (status {status})", ""))
    host = where.removesuffix(f"/{ref.repo}")
    return HubError(what.format(ref=ref), where=where, hint=hint.format(host=host))


def _by_line(error: Exception, ref: Ref, where: str) -> DoraConvertError | None:
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            hint = "Make room there, or set HF_HOME to a larger disk."
            return OutputError(f"no space left for {ref} in the Hub's cache", hint=hint)
    if is_broken_line(error):
        hint = "Check the connection; HF_HUB_OFFLINE=1 takes what was downloaded before."
        return HubError("the Hub cannot be reached, or broke off", where=where, hint=hint)
    if isinstance(error, OSError) and error.errno is None:
        # The client's own checks, as of a file's length.
        what = f"a file of {ref} did not arrive whole"
        return HubError(what, where=where, hint=_AGAIN)
    return None


def _by_value(error: Exception, ref: Ref, where: str) -> DoraConvertError | None:
    """What the client finds wrong before or after it asks."""
    if type(error).__name__ == "HFValidationError":
        return InputError(f"{ref.repo} is no name that a repository can have")
    if isinstance(error, json.JSONDecodeError):
        hint = "There may be a proxy in between, or HF_ENDPOINT names another kind of server."
        return HubError("the answer is not one of the Hub", where=where, hint=hint)
    is_yaml = type(error).__module__.partition(".")[0] == "yaml"
    # Plain ones: a refused commit is a ValueError of another kind.
    is_card = type(error) is ValueError and ("metadata" in str(error) or _status(error) == 400)
    if is_yaml or is_card:
        hint = "Correct what stands between the --- lines at its top."
        return InputError("the Hub does not accept the metadata of README.md", hint=hint)
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _status(error: Exception) -> int:
    """The status of the answer that is at the bottom of it, or 0."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
    return 0


def _is_offline(error: Exception) -> bool:
    return any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in _chain(error))
