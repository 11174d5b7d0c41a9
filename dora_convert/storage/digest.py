"""The hash by which a file's contents are known, here and on the Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["file_sha256"]


def file_sha256(file: Path) -> str:
    """The hash of a file's contents, in hexadecimal digits. Raises OSError."""
    with file.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
