from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dora_convert.errors import InputError, OutputError
from dora_convert.storage.oserrors import enough_memory, reading, writing

FILE = Path("/data/model.safetensors")


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (errno.ENOSPC, "no space is left on the disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "permission is denied"),
        (errno.EPERM, "the operation is not permitted"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EFBIG, "it would be larger than the file system"),
        (errno.EIO, "the disk reported an error"),
        (errno.EBUSY, "it is in use, perhaps a mount point"),
        (errno.EPIPE, "broken pipe"),
    ],
)
def test_writing(code: int, what: str) -> None:
    with pytest.raises(OutputError) as caught, writing(FILE):
        raise OSError(code, "x")
    assert caught.value.what.startswith(f"model.safetensors cannot be written: {what}")
    assert caught.value.where == ("/data/model.safetensors",)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (errno.EIO, "the disk reported an error"),
        (errno.EACCES, "permission is denied"),
        (errno.EISDIR, "it is a folder, not a file"),
        (errno.EMFILE, "too many files are open"),
    ],
)
def test_reading(code: int, what: str) -> None:
    with pytest.raises(InputError) as caught, reading(FILE):
        raise OSError(code, "x")
    assert caught.value.what == f"model.safetensors cannot be read: {what}"
    assert caught.value.where == ("/data/model.safetensors",)


@pytest.mark.parametrize("seam", [reading, writing])
def test_no_memory_is_no_fault_of_a_file(
    seam: Callable[[Path], AbstractContextManager[None]],
) -> None:
    told = pytest.raises(OutputError, match="the memory does not suffice")
    with told, enough_memory(), seam(FILE):
        raise OSError(errno.ENOMEM, "x")


def test_error_without_a_number() -> None:
    with pytest.raises(InputError, match="cannot be read: odd"), reading(FILE):
        raise OSError("odd")


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), writing(FILE), reading(FILE):
        raise KeyError
    with pytest.raises(OutputError, match="cannot be written"), reading(FILE), writing(FILE):
        raise OSError(errno.ENOSPC, "x")


def test_a_path_without_a_name() -> None:
    with pytest.raises(InputError, match=r"^/ cannot be read"), reading(Path("/")):
        raise OSError(errno.EIO, "x")
