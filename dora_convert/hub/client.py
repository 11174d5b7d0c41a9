"""The Hub's own client, imported when a ref needs it, quiet, and with its errors translated."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit, urlunsplit

from dora_convert.hub.faults import is_passing, translated

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    from dora_convert.hub.refs import Ref

__all__ = [
    "endpoint",
    "is_offline",
    "open_api",
    "patiently",
    "pauses",
    "sentences",
    "tree",
    "without_bars",
]

T = TypeVar("T")

_PAUSES = (0.5, 2.0)  # seconds


def open_api() -> HfApi:
    """The client, with the endpoint, the token and the cache that the environment names."""
    from huggingface_hub import HfApi, constants, logging  # noqa: PLC0415 - local work does without
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    # Else every header that is built asks the Hub for the names of AI agents.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    # Bars are for people: logs and JSON readers get none.
    watched = sys.stderr is not None and sys.stderr.isatty()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not watched:
        disable_progress_bars()
    logging.get_logger().setLevel("ERROR")  # it tells of every retry
    return HfApi(library_name="dora-convert")


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of the client's, where ours is on the terminal."""
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants  # noqa: PLC0415

    return bool(constants.HF_HUB_OFFLINE)


def endpoint(api: HfApi) -> str:
    """The Hub's address, without the password that may be in it."""
    parts = urlsplit(api.endpoint)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


@contextmanager
def sentences(api: HfApi, ref: Ref) -> Iterator[None]:
    """Turn the client's exceptions into HubError; what is not about the Hub flies on."""
    from huggingface_hub import get_token  # noqa: PLC0415

    try:
        yield
    except Exception as error:
        known = translated(error, ref, has_token=bool(get_token()), endpoint=endpoint(api))
        if known is None:
            raise
        # Not `from error`: what the client raises holds the request, and so the token.
        raise known from None


def pauses() -> Iterator[float]:
    """Seconds to wait before each new try, for as many as there are to be."""
    return iter(_PAUSES)


def patiently(call: Callable[[], T]) -> T:
    """Call once more, twice at most, where the Hub is out of order.

    The client asks again by itself, but not for a file's contents.
    """
    for pause in pauses():
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
        time.sleep(pause)
    return call()


def tree(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    """All files of a commit."""
    from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415

    found = api.list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
