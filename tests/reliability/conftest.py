from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.sandbox import Sandbox
from tests.reliability.merges import Merges
from tests.reliability.nursery import Nursery


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Merges]:
    """Inputs that no test changes, and what a merge of them must give."""

    def run(*args: Any) -> Any:
        raise AssertionError(args)

    command: Callable[..., Any] = run
    memory = "/dev/shm"  # where fsync takes no time
    place = memory if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("merges")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Merges(Sandbox(Path(folder), command), nursery)
