"""Parts of a file on the Hub: what was asked for, of the file that was asked for, or an error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dora_convert.errors import HubError
from dora_convert.hub.client import pauses, sentences
from dora_convert.hub.faults import is_broken_line, is_passing
from dora_convert.hub.refs import Ref

if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = ["RemoteFile"]


class RemoteFile:
    """One file of one commit. Safe for threads.

    A range has no checksum to hold it against, since the Hub's is that of the whole file. So all
    else is checked: that the answer is a part (206) and the one that was asked for, out of a file
    of the right length and hash, at the right commit, and the same file every time.
    """

    def __init__(self, api: HfApi, ref: Ref, commit: str, entry: RepoFile) -> None:
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 - local work does without

        self._api = api
        self._ref = ref
        self._commit = commit
        self._entry = entry
        self._url = hf_hub_url(ref.repo, entry.path, revision=commit, endpoint=api.endpoint)
        self._tag: str | None = None

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes `start:stop` in order; goes on where a line broke off. Raises HubError."""
        at, waits = start, pauses()
        with sentences(self._api, self._ref):
            while at < stop:
                before = at
                try:
                    for chunk in self._answer(at, stop):
                        at += len(chunk)
                        yield chunk
                except Exception as error:
                    if not (is_passing(error) or is_broken_line(error)):
                        raise
                    waits = pauses() if at > before else waits
                    pause = next(waits, None)
                    if pause is None:
                        raise
                    time.sleep(pause)

    def _answer(self, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import constants, get_session  # noqa: PLC0415
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

        headers = {
            **build_hf_headers(library_name="dora-convert"),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # It follows redirects, and sends the token to no other host.
        with get_session().stream("GET", self._url, headers=headers, timeout=timeout) as response:
            self._check(response, start, stop)
            for chunk in response.iter_raw():
                start += len(chunk)
                yield chunk
        if start != stop:
            raise self._wrong("does not send what it announces")

    def _check(self, response: Response, start: int, stop: int) -> None:
        from huggingface_hub import hf_raise_for_status  # noqa: PLC0415

        if response.status_code >= 400:
            response.read()
            hf_raise_for_status(response)
        if response.status_code != 206:
            raise self._wrong("sends whole files where a part is asked for")
        first = response.history[0] if response.history else response
        commit = first.headers.get("X-Repo-Commit", self._commit)
        digest = self._entry.lfs.sha256 if self._entry.lfs is not None else None
        linked = _plain(first.headers.get("X-Linked-Etag")) or digest
        tag = _plain(response.headers.get("ETag"))
        self._tag = self._tag or tag
        if commit != self._commit or linked != digest or (tag or self._tag) != self._tag:
            raise self._wrong("answers with another file than the one that was asked for")
        span = f"bytes {start}-{stop - 1}/{self._entry.size}"
        coding = response.headers.get("Content-Encoding", "identity")
        if response.headers.get("Content-Range") != span or coding != "identity":
            raise self._wrong("sends another part of the file than the one that was asked for")

    def _wrong(self, what: str) -> HubError:
        repo = self._ref.repo
        return HubError(
            f"the Hub, or what lies in between, {what}",
            where=f"{self._entry.path} of {repo}",
            hint=f"Download the model first, and run the command again: hf download {repo}",
        )


def _plain(tag: str | None) -> str | None:
    """An ETag without its quotes."""
    return None if tag is None else tag.removeprefix("W/").strip('"')
