"""Work shared out to threads, and how it ends."""

from __future__ import annotations

import signal
import time

import pytest

from dora_convert.execution.threads import in_threads


def test_an_interrupt_waits_for_what_is_being_done() -> None:
    done: list[int] = []

    def slow(item: int) -> None:
        time.sleep(0.8 if item == 1 else 0.3)
        done.append(item)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            in_threads([1, 2, 3, 4, 5, 6], slow, 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sorted(done) == [1, 2]  # both are over, and nothing else was begun
    time.sleep(0.9)
    assert len(done) == 2
