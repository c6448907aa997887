# SPDX-License-Identifier: Apache-2.0
"""The thread of a target, and a guard for code that is not ours.

A target is made, started and stopped on one thread of its own. So a Ctrl-C of the user, which
reaches the main thread alone, cannot be mistaken for something that the target raises.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

from bridge.errors import BridgeError, TargetError

__all__ = ["TargetThread", "foreign", "raised", "traceback_of"]

T = TypeVar("T")

_TURN_SECONDS = 0.5
_STUCK_SECONDS = 10.0
"""How long a call that its caller gave up may go on before the thread counts as stuck."""


def raised(who: str, when: str, error: BaseException) -> TargetError:
    """Return the error for foreign code: "the target x" raised ``error`` "on stop"."""
    try:
        text = str(error)
    except BaseException:
        text = "(its text cannot be had)"
    return TargetError(
        f"{who} raised {type(error).__name__} {when}" + (f": {text}" if text else ""),
        evidence=traceback_of(error),
    )


def traceback_of(error: BaseException) -> str:
    """Return an error with its traceback, as evidence."""
    return "".join(traceback.format_exception(error))


@contextlib.contextmanager
def foreign(who: str, when: str) -> Iterator[None]:
    """Make whatever code of a target raises inside a :class:`bridge.errors.TargetError`.

    ``sys.exit()`` and a KeyboardInterrupt that the code raises itself too; on the main thread a
    KeyboardInterrupt passes, because there it is the user's. Errors of the bridge pass.
    """
    try:
        yield
    except BridgeError:
        raise
    except BaseException as error:
        user = threading.current_thread() is threading.main_thread()
        if user and isinstance(error, KeyboardInterrupt):
            raise
        raise raised(who, when, error) from error


class TargetThread:
    """A thread that runs one function after the other; close it at the end."""

    def __init__(self, name: str = "target") -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._last: Future[Any] | None = None
        self._stuck = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def thread(self) -> threading.Thread:
        """The thread itself."""
        return self._thread

    def call(self, function: Callable[[], T], seconds: float | None = None) -> T:
        """Run ``function`` on the thread and return its result.

        Args:
            seconds: how long that may take; None for no limit.

        Raises:
            TargetError: a call before this one was given up by its caller and does not end.
            TimeoutError: it did not return in time. It is given up.
            BaseException: what the function raises.
        """
        self._check()
        future: Future[T] = Future()
        self._last = future
        self._calls.put((function, future))
        deadline = time.monotonic() + seconds if seconds is not None else math.inf
        # In turns: a signal that comes just before a wait without an end would not be seen in it.
        while not wait([future], min(_TURN_SECONDS, max(0, deadline - time.monotonic()))).done:
            if time.monotonic() >= deadline:
                self._stuck = True
                raise TimeoutError
        return future.result()

    def call_foreign(
        self, who: str, when: str, function: Callable[[], T], seconds: float | None = None
    ) -> T:
        """As :meth:`call`, with :func:`foreign` around the function.

        Raises:
            TargetError: also if the function did not return in time; the evidence is where it is.
        """

        def guarded() -> T:
            with foreign(who, when):
                return function()

        try:
            return self.call(guarded, seconds)
        except TimeoutError:
            # What the function raises is a TargetError.
            raise TargetError(
                f"{who} did not return {when} within {seconds or 0:g} s",
                evidence=self.stack(),
                hint="a start() returns when requests are answered: a server's loop belongs on a "
                "thread of its own; --target-timeout allows more time",
            ) from None

    def stack(self) -> str:
        """Return where the code on the thread is now."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def close(self) -> None:
        """End the thread; one that is stuck in code of the target is left behind.

        Raises:
            TargetError: it is stuck.
        """
        self._calls.put(None)
        self._check()
        self._thread.join()

    def _check(self) -> None:
        """Wait for a call whose caller was interrupted, but not for ever."""
        last = self._last
        if last is None or last.done():
            return
        if self._stuck or not wait([last], _STUCK_SECONDS).done:
            self._stuck = True
            raise TargetError(
                "the target was interrupted, but its code did not return; its thread is abandoned"
            )

    def _run(self) -> None:
        while (order := self._calls.get()) is not None:
            function, future = order
            try:
                result = function()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            # Neither is kept alive until the next call.
            del order, function, future
