# SPDX-License-Identifier: Apache-2.0
"""The device host whose doorbell has ended by itself: what is known is told."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from bridge.device.kcov import Kcov
from bridge.device.streams import Stream
from bridge.errors import DoorbellError, SourceError
from bridge.session.device_host import DeviceHost
from bridge.session.stats import Stats
from bridge.sources.ledger import Cursor


@pytest.fixture
def host() -> Iterator[DeviceHost]:
    with DeviceHost(1 << 20) as host:
        yield host


def end_doorbell(host: DeviceHost) -> None:
    """Have the doorbell's thread end as it would on a defect of the bridge."""

    def fail(now: int) -> None:
        raise ZeroDivisionError("a defect")

    host.doorbell._repair = fail  # type: ignore[method-assign]
    host.doorbell._repair_at = 0
    host.doorbell._awaken()
    host.doorbell._thread.join(20)
    assert not host.doorbell._thread.is_alive()


def test_fill_after_the_doorbell_ended_has_the_figures_and_the_reason(
    host: DeviceHost, caplog: pytest.LogCaptureFixture
) -> None:
    host.device.totals.returns += 7
    with caplog.at_level(logging.ERROR):
        end_doorbell(host)
    assert "the doorbell ended by itself" in caplog.text
    for _ in range(2):
        stats = Stats()
        host.fill(stats)
        assert stats.returns == 7
        assert stats.problem == "the doorbell ended by itself: ZeroDivisionError: a defect"
    with pytest.raises(DoorbellError, match="a defect") as raised:
        host.call(lambda: None)
    assert "in fail" in raised.value.evidence


def test_call_that_waits_when_the_doorbell_ends_fails_at_once(host: DeviceHost) -> None:
    entered, go_on = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def block() -> None:
        entered.set()
        go_on.wait(60)

    def wait() -> None:
        try:
            host.doorbell.call(lambda: None, 60)
        except DoorbellError as error:
            failures.append(error)

    blocking = threading.Thread(target=host.doorbell.call, args=(block, 60))
    blocking.start()
    assert entered.wait(20)

    def fail() -> None:
        raise ZeroDivisionError("a defect")

    # What carries out calls is what fails.
    host.doorbell._call_next = fail  # type: ignore[method-assign]
    waiting = threading.Thread(target=wait)
    waiting.start()
    go_on.set()
    waiting.join(20)
    blocking.join(20)
    assert [str(failure) for failure in failures] == [
        "the doorbell ended by itself: ZeroDivisionError: a defect"
    ]


def test_call_that_waits_when_the_doorbell_is_stopped_fails_at_once(host: DeviceHost) -> None:
    entered, go_on = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def block() -> None:
        entered.set()
        go_on.wait(60)

    def wait() -> None:
        try:
            host.doorbell.call(lambda: None, 20)
        except (DoorbellError, TimeoutError) as error:
            failures.append(error)

    blocking = threading.Thread(target=host.doorbell.call, args=(block, 60))
    blocking.start()
    assert entered.wait(20)
    waiting = threading.Thread(target=wait)
    waiting.start()
    while not host.doorbell._calls:
        time.sleep(0.001)
    closing = threading.Thread(target=host.close)
    closing.start()
    while not host.doorbell._stopping:
        time.sleep(0.001)
    go_on.set()
    for thread in (closing, waiting, blocking):
        thread.join(40)
    assert [str(failure) for failure in failures] == ["the doorbell's thread does not run"]


def test_deliver_without_a_doorbell_counts_as_a_failure_of_the_source(host: DeviceHost) -> None:
    end_doorbell(host)
    host.deliver(0x17, [1, 2])
    assert isinstance(host.doorbell.failure, SourceError)
    assert "coverage for handle 0x17 is lost: the doorbell ended" in str(host.doorbell.failure)


def test_call_without_an_answer_in_time_is_a_doorbell_error(
    host: DeviceHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.session.device_host.CALL_SECONDS", 1.0)
    entered, go_on = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        go_on.wait(60)

    blocking = threading.Thread(target=host.doorbell.call, args=(block, 60))
    blocking.start()
    assert entered.wait(20)
    try:
        with pytest.raises(DoorbellError, match="does not answer") as raised:
            host.call(lambda: None)
        assert "overloaded" in raised.value.hint
        stats = Stats()
        host.fill(stats)
        assert "does not answer" in stats.problem
    finally:
        go_on.set()
        blocking.join(20)


def test_close_stream_of_many_threads_answers_other_requests_in_between(host: DeviceHost) -> None:
    stream = Stream(1 << 10)
    host.open_stream(stream)
    for slot in range(20):
        kcov = host.call(functools.partial(host.device.open, 1, slot))
        joins = functools.partial(host.device.join_stream, kcov, slot + 1, stream.number)
        assert host.call(joins) == 0
    reset, calls = host.device._reset, []

    def slow(kcov: Kcov[Cursor], unreported: int = 0) -> None:
        time.sleep(0.06)
        reset(kcov, unreported)

    host.device._reset = slow  # type: ignore[method-assign]
    serve = host.doorbell._call_next

    def count() -> None:
        calls.append(host.device.enabled)
        serve()

    host.doorbell._call_next = count  # type: ignore[method-assign]
    host.close_stream(stream)
    assert host.device.enabled == 0
    assert calls[:20] == list(range(20, 0, -1)), "one thread a call, because each takes so long"


class Failing:
    """A source that raises once."""

    def __init__(self) -> None:
        self.left = 1

    def consume(self) -> list[int]:
        self.left -= 1
        if self.left == 0:
            raise SourceError("the tracer failed: no luck")
        return []


def test_consume_of_a_source_that_raises_counts_as_its_failure() -> None:
    with DeviceHost(1 << 20, source=Failing()) as host:
        host.consume()
        host.consume()
        stats = Stats()
        host.fill(stats)
        assert stats.source_failures == 1
        assert str(host.doorbell.failure) == "the tracer failed: no luck"
