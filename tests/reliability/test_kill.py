"""SIGKILL at any time: OUT is complete or not there, and the same command ends the work."""

from __future__ import annotations

import random

import pytest

from tests.reliability.merges import SHARDS, Merges
from tests.reliability.nursery import Nursery

POINTS = 60  # there are at least so many calls at which a run can be hit


def at_every_call(merges: Merges, action: str, *, step: int = 1, first: int = 1) -> None:
    """Hit the calls one after the other, until the count ends; each time the work ends well."""
    taken_over = set()
    point = first
    while True:
        merges.clear()
        ended = merges.run(fault=merges.fault(point, action))
        if ended.code == 0:
            break
        assert ended.code == -9, ended
        point += step
        taken_over.add(merges.resume())
    assert point > POINTS
    assert len(taken_over) > SHARDS / 2


@pytest.mark.parametrize(("action", "first"), [("kill", 1), ("killed", 4)])
def test_at_many_calls(merges: Merges, action: str, first: int) -> None:
    at_every_call(merges, action, step=9, first=first)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "killed"])
def test_at_every_call(merges: Merges, action: str) -> None:
    at_every_call(merges, action)


def at_random_times(merges: Merges, nursery: Nursery, count: int) -> set[int]:
    """Returns how many shards were taken over; most runs are hit where they write."""
    times = random.Random(count)
    command = merges.command("--workers", "2")
    merges.clear()
    length = max(nursery.run(*command).seconds, 0.05)
    killed = 0
    taken_over = set()
    while killed < count:
        merges.clear()
        after = times.triangular(0, 1.1 * length, 0.9 * length)
        if nursery.run(*command, killed_after=after).code == -9:
            killed += 1
            taken_over.add(merges.resume())
    return taken_over


def test_at_some_times(merges: Merges, nursery: Nursery) -> None:
    assert at_random_times(merges, nursery, 8)


@pytest.mark.slow
def test_at_200_times(merges: Merges, nursery: Nursery) -> None:
    assert len(at_random_times(merges, nursery, 200)) > 2


def test_again_and_again(merges: Merges) -> None:
    """Each time a little later, without ever beginning anew."""
    merges.clear()
    known: dict[str, tuple[int, int]] = {}
    for count in range(1, 3 * SHARDS):
        fault = merges.fault(2, calls=("fsync",), about=".safetensors.tmp")
        ended = merges.run(fault=fault)
        if ended.code == 0:
            assert count == SHARDS  # one more each time, and the last run has one to write
            assert merges.files(merges.out) == merges.expected
            return
        assert ended.code == -9
        finished = merges.finished()
        assert finished.items() > known.items()
        known = finished
    raise AssertionError


def test_while_an_old_output_is_replaced(merges: Merges) -> None:
    """The old one, or the new one, and never anything else under its name."""
    old = {"old.txt", "model.safetensors"}
    seen = set()
    for point in range(1, 200):
        merges.clear()
        merges.out.mkdir()
        for name in old:
            (merges.out / name).write_text("old")
        command = ("--overwrite",)
        ended = merges.run(*command, fault=merges.fault(point, calls=REPLACING))
        if ended.code == 0:
            break
        names = {entry.name for entry in merges.out.iterdir()}
        seen.add(names == old)
        assert names in (old, set(merges.expected))
        assert merges.run(*command).code == 0
        merges.check_promise()
        assert {entry.name for entry in merges.place.iterdir()} == {"out"}
    assert seen == {True, False}


REPLACING = ("rename", "unlink", "rmdir")
