# SPDX-License-Identifier: Apache-2.0
"""What happens in a session, for those who subscribe to it: reports, progress, plugins."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from bridge.errors import BridgeError

__all__ = [
    "Booted",
    "Event",
    "Events",
    "GuestLost",
    "Listener",
    "Reset",
    "TraceBegan",
    "TraceEnded",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Anything that happens in a session."""


@dataclass(frozen=True)
class Booted(Event):
    """The guest is ready for commands and its target is set up."""

    kernel: str
    """Release of the guest's kernel."""
    seconds: float
    """How long it took from the start of QEMU."""
    from_snapshot: bool


@dataclass(frozen=True)
class Reset(Event):
    """The guest is ready again, as it was after its start."""

    count: int
    """How many resets there were, with this one."""


@dataclass(frozen=True)
class TraceBegan(Event):
    """A command is about to run under kcov."""

    command: tuple[str, ...]


@dataclass(frozen=True)
class TraceEnded(Event):
    """A command under kcov has ended, or was cut off."""

    command: tuple[str, ...]
    exit_status: int | None
    """None for a command that was cut off."""
    pcs: int
    """How many PCs it brought."""


@dataclass(frozen=True)
class GuestLost(Event):
    """The guest is gone; published on a thread of the machine."""

    error: BridgeError


Listener = Callable[[Event], object]


class Events:
    """The subscribers of one session.

    A listener is called on the thread on which the event happens, and should return soon. What it
    raises is logged and does not disturb the session.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _listeners
        self._listeners: dict[object, Listener] = {}

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with each event from now on; return a function that ends it."""
        key = object()
        with self._lock:
            self._listeners[key] = listener

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.pop(key, None)

        return unsubscribe

    def publish(self, event: Event) -> None:
        """Tell all subscribers, in the order in which they came."""
        with self._lock:
            listeners = tuple(self._listeners.values())
        for listener in listeners:
            try:
                listener(event)
            except (KeyboardInterrupt, SystemExit):
                # On the main thread it is the user's, or the caller's own wish to end.
                if threading.current_thread() is threading.main_thread():
                    raise
                logger.exception("a listener ended on %s", type(event).__name__)
            except Exception:
                logger.exception("a listener failed on %s", type(event).__name__)
