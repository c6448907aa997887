# SPDX-License-Identifier: Apache-2.0
"""Decide when the doorbell polls for the next request, and when it sleeps.

Waking up takes ten times as long as answering, so after a request the loop polls for the next one.
But polling uses a processor that the target or another guest may need. The names are those of KVM's
halt polling (``Documentation/virt/kvm/halt-polling.rst`` in Linux), which decides the same. There
the time to poll grows and shrinks; here it is fixed, and the pause after failed polls grows and
shrinks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

__all__ = ["PREEMPTED_NS", "CpuContention", "PollPolicy"]

PREEMPTED_NS = 100_000
"""If the gap between two looks of a polling loop is longer, another thread had its processor or the
interpreter lock: Linux gives each thread some hundred microseconds at least."""
MAX_PAUSE_NS = 50_000_000
"""The pause after a preempted poll, and the longest pause after failed polls."""
MIN_PAUSE_NS = 4_000_000
"""The shortest pause after a failed poll."""
FREE_FAILURES = 2
"""How many polls in a row may fail without a pause if the processors are not contended. Each burst
of calls ends with a failed poll."""
MISSED_REQUESTS = 4
"""So many requests in a row that polls would have seen end a pause. A poll that fails costs what
these save: each of them had to wake a sleeping thread."""
CLOSE_POLLS = 5
"""A poll follows a request if the previous one came at most this many times ``poll_ns`` earlier."""


class CpuContention:
    """Tells whether more threads are runnable than this machine has processors.

    The caller's own thread counts as one.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._processors = os.cpu_count() or 1
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._fd)

    def cpu_contended(self) -> bool:
        """Return whether they are; True if the system does not say."""
        try:
            # proc_loadavg(5): three averages, then runnable/all.
            runnable = int(os.pread(self._fd, 64, 0).split()[3].partition(b"/")[0])
        except (OSError, ValueError, IndexError):
            return True
        return runnable > self._processors


class PollPolicy:
    """Decides how long the doorbell polls. All times are in nanoseconds, of one monotonic clock.

    A poll starts after a request that closely followed the previous one, and lasts until
    ``poll_ns`` after the last request. A poll fails if it sees no request. A pause without polls
    follows

    * a preempted poll, if the processors are contended;
    * a failed poll, if they are contended or more than ``FREE_FAILURES`` polls in a row failed. The
      pause doubles with each failure and halves with each success.

    It ends early after ``MISSED_REQUESTS`` requests, each within ``poll_ns`` of the one before,
    unless the processors are contended then: many programs make their calls in bursts shorter than
    a pause.

    Args:
        poll_ns: how long to poll after a request; 0: never. It may be changed at any time.
        cpu_contended: tells whether more threads are runnable than there are processors.
    """

    def __init__(self, poll_ns: int, cpu_contended: Callable[[], bool]) -> None:
        self.poll_ns = poll_ns
        self.poll_until = 0
        """When the current poll ends; 0 without a poll."""
        self.looked = 0
        """When the loop last looked for requests, or served one."""
        self._cpu_contended = cpu_contended
        self._last_request = 0
        self._paused_until = 0
        self._pause_ns = MIN_PAUSE_NS
        self._failures = 0
        self._missed = 0

    @property
    def paused(self) -> bool:
        """Whether polling was paused when the loop last looked."""
        return self.looked <= self._paused_until

    def served(self, now: int) -> bool:
        """Note that a request was served now, outside of a poll.

        Returns:
            Whether a poll starts.
        """
        starts = False
        since_last = now - self._last_request
        if now < self.poll_until:
            self._succeed()
        elif now <= self._paused_until:
            self._note_missed(since_last)
        if since_last < CLOSE_POLLS * self.poll_ns and now > self._paused_until:
            starts = not self.poll_until
            self.poll_until = now + self.poll_ns
        self._last_request = self.looked = now
        return starts

    def polled(self, requests: int, looked: int, until: int) -> None:
        """Note the result of a part of a poll.

        Args:
            requests: how many requests were served.
            looked: the time of the last look, or of the last served request.
            until: the new end of the poll.
        """
        self.looked = looked
        if requests:
            self.poll_until = until
            self._last_request = looked
            self._succeed()

    def keep_polling(self, now: int) -> bool:
        """Return whether to go on polling. If not, the poll has ended, and the loop sleeps next."""
        if not self.poll_until:
            return False
        if now < self.poll_until:
            if now - self.looked <= PREEMPTED_NS or not self._cpu_contended():
                return True
            self.poll_until = 0
            self._pause(now + MAX_PAUSE_NS)
            return False
        self.poll_until = 0
        self._fail(now)
        return False

    def _note_missed(self, since_last: int) -> None:
        """Note a request in a pause; end the pause if enough of them came close together."""
        self._missed = self._missed + 1 if since_last < self.poll_ns else 0
        if self._missed == MISSED_REQUESTS:
            self._missed = 0
            if not self._cpu_contended():
                self._paused_until = 0
                self._succeed()

    def _pause(self, until: int) -> None:
        self._paused_until = until
        self._missed = 0

    def _succeed(self) -> None:
        """Shrink the pause."""
        self._pause_ns = max(self._pause_ns // 2, MIN_PAUSE_NS)
        self._failures = 0

    def _fail(self, now: int) -> None:
        """Pause, and grow the pause."""
        self._failures += 1
        if self._failures > FREE_FAILURES or self._cpu_contended():
            self._pause(max(self._paused_until, now + self._pause_ns))
            self._pause_ns = min(2 * self._pause_ns, MAX_PAUSE_NS)
