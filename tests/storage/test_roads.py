"""The cheaper of two ways, whichever it is, and only as long as it is."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

import pytest

from dora_convert.storage.roads import Roads


def travel(way: Roads, costs: tuple[float, float], times: int) -> Counter[int]:
    """So often, a byte costing so much on each; returns how often each was taken."""
    taken: Counter[int] = Counter()
    for _ in range(times):
        road = way.next()
        way.took(road, 1000 * costs[road], 1000)
        taken[road] += 1
    return taken


@pytest.mark.parametrize("cheaper", [0, 1])
def test_both_are_tried_and_the_cheaper_taken(cheaper: int) -> None:
    way = Roads(fmean, fmean)
    costs = (1.0, 2.0) if cheaper == 0 else (2.0, 1.0)
    assert travel(way, costs, 16) == {0: 8, 1: 8}
    assert travel(way, costs, 640)[1 - cheaper] == 10
    assert way.seconds(3) == pytest.approx(3)


def test_what_has_changed_is_noticed() -> None:
    way = Roads(fmean, fmean)
    travel(way, (1.0, 2.0), 100)
    assert travel(way, (9.0, 2.0), 100)[1] > 90
    assert travel(way, (1.0, 2.0), 1000)[0] > 400  # it takes some of the one in 64


def test_one_dear_time_changes_nothing() -> None:
    way = Roads(fmean, fmean)
    travel(way, (1.0, 2.0), 100)
    travel(way, (4.0, 2.0), 1)
    assert travel(way, (1.0, 2.0), 26) == {0: 26}


def test_of_waiting_the_shortest_counts() -> None:
    way = Roads(fmean, min)
    for i in range(16):
        road = way.next()
        way.took(road, (1.0, 0.5 if i == 14 else 20.0)[road], 1)
    assert travel(way, (1.0, 9.0), 1) == {1: 1}


def test_a_way_that_was_never_finished() -> None:
    """Both go on being tried; nothing is known of the cost."""
    way = Roads(fmean, fmean)
    for _ in range(40):
        if way.next() == 0:
            way.took(0, 1.0, 1)
    assert {way.next(), way.next()} == {0, 1}
    assert way.seconds(1) == 0
