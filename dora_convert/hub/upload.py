"""Files on their way to one commit: sent as they come, seen by nobody until it is made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_convert.errors import VerificationError
from dora_convert.hub.client import tree
from dora_convert.hub.copying import Originals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from huggingface_hub import (
        CommitInfo,
        CommitOperationAdd,
        CommitOperationCopy,
        CommitOperationDelete,
        HfApi,
    )
    from huggingface_hub.hf_api import RepoFile

    Operation = CommitOperationAdd | CommitOperationCopy

__all__ = ["Content", "Upload", "is_same", "size_of"]

Content = Path | bytes

_LARGE = 10_000_000


class Upload:
    """What a commit on top of `parent` will hold. Contents of files that were sent may be deleted.

    `place` are the client's arguments that say where the commit goes. Files that are among the
    `originals` are copied by the Hub itself, if it does that. The client's errors fly.
    """

    def __init__(
        self,
        api: HfApi,
        repo: str,
        parent: str,
        place: Mapping[str, Any],
        originals: Originals | None = None,
    ) -> None:
        self.copied: list[str] = []
        self._api = api
        self._repo = repo
        self._parent = parent
        self._place = dict(place)
        self._originals = originals
        self._ready: dict[str, Operation] = {}
        self._added: dict[str, Operation] = {}
        self._contents: dict[str, Content] = {}

    def add(self, name: str, content: Content, *, at_once: bool = False) -> bool:
        """A file more; large ones, or any if `at_once`, are sent now. Whether it was sent."""
        operation = self._ready.pop(name, None)
        if operation is None:
            operation = self._made(name, content, at_once=at_once)
        self._added[name] = operation
        self._contents[name] = content
        return _is_sent(operation)

    def add_known(self, name: str, sha256: str, nbytes: int) -> None:
        """A large file that an earlier process has sent to the same repository."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415
        from huggingface_hub.lfs import UploadInfo  # noqa: PLC0415

        # As the client leaves it after sending: no contents, and the name that they have there.
        operation = CommitOperationAdd(name, b"")
        operation.upload_info = UploadInfo(nbytes, b"", sha256=bytes.fromhex(sha256))
        operation._upload_mode, operation._is_uploaded = "lfs", True
        self._added[name] = operation

    def _made(self, name: str, content: Content, *, at_once: bool) -> Operation:
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415 - local work does without

        operation = CommitOperationAdd(name, content)
        if self._originals is not None and isinstance(content, Path):
            copy = self._originals.copied(name, operation.upload_info.sha256.hex())
            if copy is not None:
                self.copied.append(name)
                return copy
        if at_once or size_of(content) > _LARGE:
            self._api.preupload_lfs_files(self._repo, [operation], **self._place)
        return operation

    def rebase(self, parent: str) -> None:
        """Begin once more, on top of another commit: what was sent needs only be added again."""
        self._parent = parent
        self._ready = {name: made for name, made in self._added.items() if _is_sent(made)}
        self._added = {}

    def commit(self, message: str, removed: Sequence[str] = ()) -> tuple[str, str]:
        """The commit, and the address of the pull request if there is one.

        Raises VerificationError if the Hub then holds something else.
        """
        from huggingface_hub import CommitOperationDelete  # noqa: PLC0415

        api, repo = self._api, self._repo
        gone = [CommitOperationDelete(name, is_folder=False) for name in removed]
        operations: list[Operation | CommitOperationDelete] = [*self._added.values(), *gone]
        try:
            info: CommitInfo = api.create_commit(
                repo,
                operations,
                commit_message=message,
                parent_commit=self._parent,
                **self._place,
            )
        except Exception:
            # The answer may be what was lost, and not the commit. A pull request has no place yet.
            if self._place["create_pr"]:
                raise
            now = api.model_info(repo, revision=self._place["revision"]).sha
            if now in (None, self._parent) or self.differences(tree(api, repo, str(now))):
                raise
            return str(now), ""
        wrong = self.differences(tree(api, repo, info.oid))
        if wrong:
            raise VerificationError(
                "the Hub holds other files than were sent", problems=wrong, hint="Push once more."
            )
        return info.oid, str(info.pr_url or "")

    def differences(self, held: Mapping[str, RepoFile]) -> list[str]:
        """Where the Hub, which says that it holds this, holds something else than what was sent."""
        wrong = []
        for name, operation in self._added.items():
            entry = held.get(name)
            if entry is None:
                wrong.append(f"{name}: missing")
            elif entry.lfs is not None and entry.lfs.sha256 != self._sha256(operation):
                wrong.append(f"{name}: sha256 {entry.lfs.sha256}")
            elif entry.lfs is None and not is_same(self._contents[name], entry):
                wrong.append(f"{name}: differs")
        return wrong

    def _sha256(self, operation: Operation) -> str:
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        if isinstance(operation, CommitOperationAdd):
            return operation.upload_info.sha256.hex()
        assert self._originals is not None
        return self._originals.sha256(operation.src_path_in_repo)


def is_same(content: Content, entry: RepoFile) -> bool:
    """Whether the Hub holds this content."""
    size = size_of(content)
    if entry.size != size:
        return False
    if entry.lfs is not None:
        return _digest(content, hashlib.sha256()) == entry.lfs.sha256
    # As git names contents; no use as a protection, and none is made of it.
    return _digest(content, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)) == (
        entry.blob_id
    )


def size_of(content: Content) -> int:
    """Bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _is_sent(operation: Operation) -> bool:
    """The client lets go of what it has sent; what it has not, it sends with the commit."""
    return getattr(operation, "path_or_fileobj", b"") == b""


def _digest(content: Content, digest: Any) -> str:
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return str(digest.hexdigest())
