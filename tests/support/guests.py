# SPDX-License-Identifier: Apache-2.0
"""Guests that tests share: one for each set of settings, reset between two tests.

A test asks for one with the marker ``guest`` and the fixture ``session``::

    @pytest.mark.guest(target="none", source="python")
    def test_hostname_is_set(session: Session) -> None: ...

The session starts as one of :func:`bridge.boot`, and its guest is as new when the test begins. A
start takes seconds, a reset a tenth of one. :func:`order` moves tests that ask for the same
settings next to each other; tests that ask for none stay where they are.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import bridge
from bridge.errors import BridgeError
from bridge.session.session import Session
from bridge.sources.pcs import PC_BASE

__all__ = [
    "SEVERAL_CPUS",
    "TIMEOUT_MS",
    "Guests",
    "complaints",
    "complaints_in_full",
    "kernel_functions",
    "never_traced",
    "order",
    "stalled_host",
]

MARKER = "guest"
FIXTURE = "session"
ALIVE = 2
"""How many guests wait for later tests at most."""

SEVERAL_CPUS = min(4, max(2, os.cpu_count() or 1))
"""The processors of a guest that is to have several: those beyond the machine's only wait."""

TIMEOUT_MS = "/sys/module/kcov_bridge/parameters/timeout_ms"
"""In the guest: how long a request waits for the host."""

Key = tuple[tuple[str, object], ...]
"""The settings of a guest, sorted."""

_COMPLAINT = (
    "WARNING:|BUG:|BUG [a-z]|Oops|[^n]stall|hung task|blocked for more than|refcount_t|"
    "general protection|ODEBUG|INFO: trying to register|INFO: lockdep is turned off"
)


def complaints(session: Session) -> str:
    """What the guest kernel complains about: the first line of each complaint."""
    return session.run(f"dmesg | grep -E {_COMPLAINT!r}").text


def complaints_in_full(session: Session) -> str:
    """The guest kernel's messages from its first complaint on."""
    return session.run(f"dmesg | sed -nE '/{_COMPLAINT}/,$p'").text


def kernel_functions(session: Session, pcs: Iterable[int]) -> list[str]:
    """The guest kernel's functions of a trace; each of its PCs must be in one."""
    assert session.kernel is not None
    names = []
    for pc in pcs:
        if pc < PC_BASE:
            symbol = session.kernel.code.symbols.lookup(pc)
            assert symbol is not None, hex(pc)
            names.append(symbol.name)
    return names


def never_traced(functions: Iterable[str]) -> set[str]:
    """Those of the guest kernel's functions that no trace may have: what Linux' kcov leaves out
    (three for all), and the module's own."""
    left_out = {"__schedule", "entry_SYSCALL_64", "asm_exc_page_fault"}
    return {name for name in functions if name in left_out or name.startswith("kb_")}


@contextlib.contextmanager
def stalled_host(session: Session, *, timeout_ms: int) -> Iterator[None]:
    """Have the doorbell answer nothing meanwhile; the guest gives up after ``timeout_ms``."""
    before = session.guest.run(
        f"cat {TIMEOUT_MS}; echo {timeout_ms} >{TIMEOUT_MS}", check=True
    ).text.strip()
    stalled, goes_on = threading.Event(), threading.Event()

    def stall() -> None:
        stalled.set()
        goes_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        stalling = pool.submit(session.doorbell.call, stall, 90)
        try:
            assert stalled.wait(30)
            yield
        finally:
            goes_on.set()
        stalling.result(90)
    session.guest.run(f"echo {before} >{TIMEOUT_MS}", check=True)


def key_of(item: pytest.Item) -> Key | None:
    """The settings that a test asks for, None for one that asks for no guest."""
    marker = item.get_closest_marker(MARKER)
    if marker is None or FIXTURE not in getattr(item, "fixturenames", ()):
        return None
    return tuple(sorted(marker.kwargs.items()))


def order(items: list[pytest.Item]) -> None:
    """Move tests that ask for the same guest behind the first of them, in place."""
    groups: dict[Key, list[pytest.Item]] = {}
    places: list[pytest.Item | Key] = []
    for item in items:
        key = key_of(item)
        if key is None:
            places.append(item)
            continue
        if key not in groups:
            places.append(key)
        groups.setdefault(key, []).append(item)
    ordered: list[pytest.Item] = []
    for place in places:
        ordered += groups[place] if isinstance(place, tuple) else [place]
    items[:] = ordered


class Guests:
    """The guests that wait for tests, the one that was used last at the end."""

    def __init__(self) -> None:
        self._wanted: Counter[Key] = Counter()
        self._alive: dict[Key, Session] = {}

    def expect(self, items: Sequence[pytest.Item]) -> None:
        """Learn which tests there are: no guest outlives the last test that asks for it."""
        self._wanted = Counter(key for item in items if (key := key_of(item)) is not None)

    def get(self, item: pytest.Item) -> Session:
        """The guest that a test asks for, started or reset.

        Raises:
            BridgeError: it does not start.
        """
        key = key_of(item)
        assert key is not None, f"the fixture {FIXTURE!r} needs the marker {MARKER!r}"
        session = self._alive.pop(key, None)
        if session is not None:
            try:
                session.reset()
            except BridgeError:
                # A test may lose its guest, or have one that cannot be reset.
                self._close(session)
                session = None
        if session is None:
            while len(self._alive) >= ALIVE:
                self._close(self._alive.pop(next(iter(self._alive))))
            session = _start(key)
        self._alive[key] = session
        return session

    def release(self, item: pytest.Item, following: pytest.Item | None) -> None:
        """Close what no later test uses, after ``item``.

        A guest whose target is measured in this process lives only while tests in a row use it:
        two measurements in one process would be in each other's way.
        """
        key = key_of(item)
        if key is not None:
            self._wanted[key] -= 1
        following_key = None if following is None else key_of(following)
        for each in list(self._alive):
            measured = dict(each).get("target") != "none"
            if self._wanted[each] <= 0 or (measured and each != following_key):
                self._close(self._alive.pop(each))

    def close(self) -> None:
        """Close all."""
        for session in self._alive.values():
            self._close(session)
        self._alive.clear()

    @staticmethod
    def _close(session: Session) -> None:
        with contextlib.suppress(BridgeError):
            session.__exit__(None, None, None)


def _start(key: Key) -> Session:
    settings: dict[str, Any] = dict(key)
    return bridge.boot(**settings).__enter__()
