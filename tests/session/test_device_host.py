# SPDX-License-Identifier: Apache-2.0
"""The device host whose doorbell has ended by itself: what is known is told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from bridge.errors import DoorbellError, SourceError
from bridge.session.device_host import DeviceHost
from bridge.session.stats import Stats


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


def test_deliver_without_a_doorbell_counts_as_a_failure_of_the_source(host: DeviceHost) -> None:
    end_doorbell(host)
    host.deliver(0x17, [1, 2])
    assert isinstance(host.doorbell.failure, SourceError)
    assert "coverage for handle 0x17 is lost: the doorbell ended" in str(host.doorbell.failure)


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
