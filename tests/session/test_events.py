# SPDX-License-Identifier: Apache-2.0
"""Events of a session: who subscribes is told, and cannot disturb it."""

from __future__ import annotations

import sys
import threading

import pytest

from bridge.session.events import Event, Events, Reset


def test_events_reach_subscribers_in_their_order_until_they_leave() -> None:
    events, seen = Events(), list[tuple[str, Event]]()
    leave = events.subscribe(lambda event: seen.append(("first", event)))
    events.subscribe(lambda event: seen.append(("second", event)))
    events.publish(Reset(1))
    leave()
    leave()
    events.publish(Reset(2))
    assert seen == [("first", Reset(1)), ("second", Reset(1)), ("second", Reset(2))]


def test_events_listener_that_raises_is_logged_and_the_others_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    events, seen = Events(), list[Event]()

    def raises(event: Event) -> None:
        raise RuntimeError("no such luck")

    events.subscribe(raises)
    events.subscribe(seen.append)
    events.publish(Reset(1))
    assert seen == [Reset(1)]
    assert "a listener failed on Reset" in caplog.text
    assert "no such luck" in caplog.text


def test_events_listener_that_exits_ends_the_main_thread_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    events = Events()
    events.subscribe(lambda event: sys.exit(3))
    with pytest.raises(SystemExit):
        events.publish(Reset(1))
    went_on = threading.Event()

    def elsewhere() -> None:
        events.publish(Reset(2))
        went_on.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert went_on.is_set()
    assert "a listener ended on Reset" in caplog.text


def test_events_listener_may_subscribe_and_leave_while_it_is_told() -> None:
    events, seen = Events(), list[Event]()

    def once(event: Event) -> None:
        leave()
        events.subscribe(seen.append)

    leave = events.subscribe(once)
    events.publish(Reset(1))
    events.publish(Reset(2))
    assert seen == [Reset(2)]
