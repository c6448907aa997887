# SPDX-License-Identifier: Apache-2.0
"""What all tests share: guests, and the signals that a child of a test may be sent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from bridge.session.session import Session
from tests.support.examples import examples
from tests.support.guests import Guests, order

# How long an example takes says how busy the machine is, not what is wrong.
hypothesis.settings.register_profile(
    "busy machine",
    deadline=None,
    max_examples=examples(50),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("busy machine")

_GUESTS = pytest.StashKey[Guests]()
_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "guest(**settings): the fixture session has a guest with these settings of bridge.boot",
    )
    config.addinivalue_line(
        "markers", "first: takes long, and does not begin with the default guest image"
    )
    config.stash[_GUESTS] = Guests()
    # A shell has its background jobs ignore SIGINT and SIGQUIT, nohup SIGHUP; children inherit it.
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            handler = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
            signal.signal(number, handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_GUESTS].close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A guest takes up to two processors, its own and the one of the host code that serves it."""
    return max(2, (os.cpu_count() or 1) // 2)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order(items)
    if hasattr(config, "workerinput"):
        # Workers take file by file: the long ones first, so that none is left at the end. Where the
        # cache is empty, one builds the default image; the others have what to do meanwhile.
        items.sort(key=lambda item: [item.get_closest_marker(n) is None for n in ("first", "vm")])


def pytest_collection_finish(session: pytest.Session) -> None:
    # What -k and -m left.
    session.config.stash[_GUESTS].expect(session.items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        return (yield)
    finally:
        item.config.stash[_GUESTS].release(item, nextitem)


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    """The session of the guest that the marker ``guest`` asks for, as new."""
    return request.config.stash[_GUESTS].get(request.node)
