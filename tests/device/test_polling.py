# SPDX-License-Identifier: Apache-2.0
"""When the doorbell polls: the policy without a thread or a clock, and the contention it asks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import pytest

from bridge.device.polling import (
    CLOSE_POLLS,
    FREE_FAILURES,
    MAX_PAUSE_NS,
    MIN_PAUSE_NS,
    MISSED_REQUESTS,
    PREEMPTED_NS,
    CpuContention,
    PollPolicy,
)

POLL_NS = 200_000
START = 10**12


class Loop:
    """A policy and the clock that it is asked with."""

    def __init__(self, poll_ns: int = POLL_NS) -> None:
        self.now = START
        self.contended = False
        self.policy = PollPolicy(poll_ns, lambda: self.contended)

    def request(self, after: int) -> bool:
        self.now += after
        return self.policy.served(self.now)

    def keeps_polling(self, after: int) -> bool:
        self.now += after
        return self.policy.keep_polling(self.now)

    def look(self, after: int) -> None:
        self.now += after
        self.policy.looked = self.now

    def poll(self) -> None:
        """Start a poll. In a pause, wait until it is over."""
        for _ in range(2 * MAX_PAUSE_NS // POLL_NS):
            if self.request(POLL_NS):
                return
        raise AssertionError("no poll starts")

    def fail(self) -> int:
        """A poll that sees no request; return the length of the pause after it."""
        self.poll()
        self.look(POLL_NS - 1)
        assert not self.keeps_polling(1)
        ended = self.now
        while self.policy.paused:
            self.look(MIN_PAUSE_NS // 4)
        return self.now - ended


def test_served_first_request_starts_no_poll() -> None:
    loop = Loop()
    assert not loop.request(0)
    assert not loop.keeps_polling(1)


@pytest.mark.parametrize(("after", "starts"), [(CLOSE_POLLS * POLL_NS - 1, True), (10**9, False)])
def test_served_starts_poll_only_after_close_request(after: int, starts: bool) -> None:
    loop = Loop()
    loop.request(0)
    assert loop.request(after) is starts
    assert loop.keeps_polling(1) is starts


def test_served_during_poll_extends_it_and_starts_no_other() -> None:
    loop = Loop()
    loop.poll()
    assert not loop.request(POLL_NS // 2)
    loop.look(POLL_NS // 2)
    assert loop.keeps_polling(PREEMPTED_NS // 2)
    assert not loop.keeps_polling(POLL_NS)


def test_served_with_zero_poll_ns_never_polls() -> None:
    loop = Loop(0)
    for _ in range(10):
        assert not loop.request(1)
        assert not loop.keeps_polling(0)


def test_polled_with_requests_extends_poll() -> None:
    loop = Loop()
    loop.poll()
    loop.policy.polled(7, loop.now + 50, loop.now + 50 + POLL_NS)
    assert loop.policy.poll_until == loop.now + 50 + POLL_NS
    assert loop.policy.looked == loop.now + 50


def test_polled_without_requests_leaves_end_of_poll() -> None:
    loop = Loop()
    loop.poll()
    until = loop.policy.poll_until
    loop.policy.polled(0, loop.now + 50, until)
    assert loop.policy.poll_until == until
    assert loop.policy.looked == loop.now + 50


@pytest.mark.parametrize("contended", [True, False])
def test_keep_polling_after_preemption_pauses_if_contended(contended: bool) -> None:
    loop = Loop()
    loop.poll()
    loop.contended = contended
    assert loop.keeps_polling(PREEMPTED_NS + 1) is not contended
    assert loop.policy.paused is contended
    if contended:
        # While they are contended it lasts MAX_PAUSE_NS, though requests come all the time.
        starts = 0
        paused_until = loop.now + MAX_PAUSE_NS
        while not starts and loop.now < 2 * paused_until:
            starts = loop.request(POLL_NS // 2) and loop.now
        assert 0 <= starts - paused_until <= POLL_NS


def test_keep_polling_contended_without_gap_goes_on() -> None:
    loop = Loop()
    loop.poll()
    loop.contended = True
    assert loop.keeps_polling(PREEMPTED_NS)


def paused() -> Loop:
    """A loop in the longest pause, after nothing but failed polls."""
    loop = Loop()
    while loop.fail() < MAX_PAUSE_NS:
        pass
    loop.poll()
    loop.look(POLL_NS - 1)
    assert not loop.keeps_polling(1)
    assert loop.policy.paused
    loop.look(MIN_PAUSE_NS)
    return loop


def test_pause_ends_with_burst_that_polls_would_have_seen() -> None:
    loop = paused()
    assert [loop.request(POLL_NS - 1) for _ in range(MISSED_REQUESTS + 1)] == [
        *[False] * MISSED_REQUESTS,
        True,
    ]
    assert not loop.policy.paused
    # It counts as a success, so the poll that it started may fail.
    loop.look(POLL_NS - 1)
    assert not loop.keeps_polling(1)
    assert not loop.policy.paused


@pytest.mark.parametrize("after", [POLL_NS, 2 * POLL_NS])
def test_pause_goes_on_with_requests_that_polls_would_not_have_seen(after: int) -> None:
    loop = paused()
    assert not any(loop.request(after) for _ in range(2 * MISSED_REQUESTS))
    assert loop.policy.paused


def test_pause_goes_on_while_contended() -> None:
    loop = paused()
    loop.contended = True
    assert not any(loop.request(1) for _ in range(3 * MISSED_REQUESTS))
    assert loop.policy.paused
    loop.contended = False
    assert any(loop.request(1) for _ in range(MISSED_REQUESTS + 1))


def test_requests_of_an_earlier_pause_do_not_end_this_one() -> None:
    loop = paused()
    for after in (POLL_NS, *[1] * (MISSED_REQUESTS - 1)):
        assert not loop.request(after)
    loop.look(MAX_PAUSE_NS)
    loop.poll()
    loop.contended = True
    assert not loop.keeps_polling(PREEMPTED_NS + 1)
    loop.contended = False
    assert not loop.request(1)
    assert loop.policy.paused


def test_failures_within_allowance_do_not_pause() -> None:
    loop = Loop()
    for _ in range(FREE_FAILURES):
        assert loop.fail() == 0
    assert loop.fail() >= MIN_PAUSE_NS


def test_failure_pauses_at_once_if_contended() -> None:
    loop = Loop()
    loop.contended = True
    assert loop.fail() >= MIN_PAUSE_NS


def test_failures_grow_pause_up_to_maximum() -> None:
    loop = Loop()
    loop.contended = True
    pauses = [loop.fail() for _ in range(8)]
    slack = MIN_PAUSE_NS // 4
    for number, pause in enumerate(pauses):
        grown = min(MIN_PAUSE_NS << number, MAX_PAUSE_NS)
        assert grown <= pause <= grown + slack


def test_success_shrinks_pause_by_half() -> None:
    loop = Loop()
    loop.contended = True
    first, second, third = (loop.fail() for _ in range(3))
    assert first < second < third
    # Would be eight times MIN_PAUSE_NS now.
    loop.poll()
    loop.request(1)
    loop.request(1)
    slack = MIN_PAUSE_NS // 4
    loop.look(POLL_NS - 1)
    assert not loop.keeps_polling(1)
    ended = loop.now
    while loop.policy.paused:
        loop.look(slack)
    assert 2 * MIN_PAUSE_NS <= loop.now - ended <= 2 * MIN_PAUSE_NS + slack


def test_success_restores_allowance_of_failures() -> None:
    loop = Loop()
    for _ in range(10):
        for _ in range(FREE_FAILURES):
            assert loop.fail() == 0
        loop.poll()
        loop.request(1)
        loop.look(POLL_NS - 1)
        # This failure is the first in a row.
        assert not loop.keeps_polling(1)
        assert not loop.policy.paused
        loop.poll()
        loop.request(1)
        loop.policy.poll_until = 0


def test_cpu_contended_follows_number_of_busy_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(os, "cpu_count", lambda: 1 << 20)
        assert not CpuContention(stack).cpu_contended()
        monkeypatch.undo()
        contention = CpuContention(stack)
        for _ in range((os.cpu_count() or 1) + 1):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        end = time.monotonic() + 60
        while not contention.cpu_contended():
            assert time.monotonic() < end
            time.sleep(0.01)


def test_cpu_contended_without_proc_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> int:
        raise PermissionError

    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        assert CpuContention(stack).cpu_contended()
