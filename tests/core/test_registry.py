"""Which plug-ins there are is what the folder says, or an error."""

from __future__ import annotations

import errno
import os
import pkgutil

import pytest

from dora_convert import loras
from dora_convert.registry import Registry


def registry() -> Registry[object]:
    return Registry("dora_convert.loras", "FORMAT", is_open=False)


def test_names() -> None:
    found = {module.name for module in pkgutil.iter_modules(loras.__path__)}
    assert registry().names() == tuple(sorted(found))
    assert "peft" in found


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOMEM, MemoryError), (errno.EACCES, PermissionError)]
)
def test_a_folder_that_cannot_be_read_is_not_empty(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    """`merge` was once no command, for lack of memory."""

    def refuse(_: object) -> list[str]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(kind):
        registry().names()
