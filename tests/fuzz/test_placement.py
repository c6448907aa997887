# SPDX-License-Identifier: Apache-2.0
"""Which job runs where."""

from __future__ import annotations

import pytest

from bridge.fuzz.placement import Placement


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_place_fills_the_workers_with_most_room_first() -> None:
    placement = Placement(4, Clock())
    assert placement.place({"a": 1, "b": 2, "c": 0}) == [(0, "b"), (1, "a"), (2, "b")]
    assert placement.place({"a": 1, "b": 2}) == []
    assert placement.place({"a": 2, "b": 2}) == [(3, "a")]


def test_job_of_a_lost_worker_starts_elsewhere() -> None:
    placement = Placement(2, Clock())
    placement.place({"a": 1, "b": 1})
    assert placement.lost({"b": 1}) == [0]
    placement.take_back(0)
    assert placement.place({"b": 1}) == []
    assert placement.place({"b": 1, "c": 1}) == [(0, "c")]
    assert placement.worker(0) == "c"


def test_job_that_fails_soon_waits_longer_each_time_and_is_given_up() -> None:
    clock = Clock()
    placement = Placement(1, clock)
    pauses = []
    while not placement.hopeless:
        began = clock.now
        while not placement.place({"a": 1}):
            clock.now += 1
            assert clock.now < began + 100
        pauses.append(clock.now - began)
        placement.ended(0)
    assert pauses == [0, 1, 3, 7, 15]
    clock.now += 10_000
    assert placement.place({"a": 1}) == []


def test_job_that_ran_long_before_it_failed_starts_at_once() -> None:
    clock = Clock()
    placement = Placement(1, clock)
    for _ in range(20):
        assert placement.place({"a": 1}) == [(0, "a")]
        clock.now += 3600
        placement.ended(0)
    assert not placement.hopeless


@pytest.mark.parametrize("before", [True, False])
def test_stop_starts_nothing_any_more(before: bool) -> None:
    placement = Placement(1, Clock())
    if before:
        placement.place({"a": 1})
        placement.take_back(0)
    placement.stop()
    assert placement.place({"a": 1}) == []


def test_job_that_ends_after_stop_does_not_start_again() -> None:
    clock = Clock()
    placement = Placement(1, clock)
    placement.place({"a": 1})
    placement.stop()
    placement.ended(0)
    clock.now += 1000
    assert placement.place({"a": 1}) == []
