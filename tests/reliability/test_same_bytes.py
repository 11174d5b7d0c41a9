"""The same bytes, whoever makes them; of where and when, see test_outputs.py."""

from __future__ import annotations

import pytest

from tests.reliability.merges import Merges


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers(merges: Merges, workers: int) -> None:
    merges.clear()
    assert merges.run("--workers", workers).code == 0
    assert merges.files(merges.out) == merges.expected
