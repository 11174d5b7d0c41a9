"""Files that the Hub has already, under another name or in another repository."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from dora_convert.hub.client import tree

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import CommitOperationCopy, HfApi
    from huggingface_hub.hf_api import RepoFile

    from dora_convert.hub.refs import Ref

__all__ = ["Originals"]


class Originals:
    """The large files of a commit, `source`, which the Hub is asked to copy into `repo` itself.

    It does so within a repository; between two of them only for files in its newer storage (Xet),
    of the same region, with a token that may read the one and write the other. What it refuses is
    sent as if there were no original, so nothing that goes wrong here is told.
    """

    def __init__(self, api: HfApi, source: Ref, repo: str) -> None:
        self._api = api
        self._source = source
        self._repo = repo

    def copied(self, name: str, sha256: str) -> CommitOperationCopy | None:
        """What puts contents of this hash at `name` without sending them; None if it cannot be."""
        from huggingface_hub import CommitOperationCopy  # noqa: PLC0415 - local work does without

        large = self._large.values()
        entry = next((e for e in large if e.lfs is not None and e.lfs.sha256 == sha256), None)
        if entry is None:
            return None
        commit = self._source.revision
        if self._source.repo == self._repo:
            return CommitOperationCopy(entry.path, name, src_revision=commit)
        if not self._is_shared(entry):
            return None
        other = self._source.repo
        return CommitOperationCopy(
            entry.path, name, src_revision=commit, src_repo_id=other, src_repo_type="model"
        )

    def sha256(self, path: str) -> str:
        """Of one of the files that were copied, by its name there."""
        lfs = self._large[path].lfs
        assert lfs is not None
        return str(lfs.sha256)

    @cached_property
    def _large(self) -> Mapping[str, RepoFile]:
        try:
            held = tree(self._api, self._source.repo, str(self._source.revision))
        except Exception:
            return {}
        return {path: entry for path, entry in held.items() if entry.lfs is not None}

    def _is_shared(self, entry: RepoFile) -> bool:
        """Have the other repository hold the contents, before they are deleted here.

        The client asks for this when it commits, which is too late for a file that has no copy.
        """
        from huggingface_hub import get_session, hf_raise_for_status  # noqa: PLC0415
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

        if entry.xet_hash is None or entry.lfs is None:
            return False
        address = f"{self._api.endpoint}/api/models/{self._source.repo}/lfs-files/duplicate"
        wanted = {"xetHash": entry.xet_hash, "sha256": entry.lfs.sha256, "filename": entry.path}
        target = {"type": "model", "name": self._repo}
        try:
            answer = get_session().post(
                address,
                headers=build_hf_headers(library_name="dora-convert"),
                json={"target": target, "files": [wanted]},
            )
            hf_raise_for_status(answer)
            return not answer.json().get("failed")
        except Exception:
            return False
