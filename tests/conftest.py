"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.reliability.nursery import Nursery

# Before torch is imported, and for the processes of tests too: its matrices are so small here that
# a second thread only waits, at twice the cost.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile(
    "search", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# The same examples in every run: a change is judged by itself. `--hypothesis-profile search` looks
# for others.
settings.register_profile("steady", settings.get_profile("search"), derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Runs commands in processes of their own, without their waiting for imports."""
    with Nursery(tmp_path_factory.mktemp("nursery")) as running:
        yield running
