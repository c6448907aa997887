# SPDX-License-Identifier: Apache-2.0
"""Makes the case of a finding as small as it gets, as long as it leads to the same title.

This is a loop of our own, not ``afl-tmin``. That one takes every crash for the same one, so a case
that leads to two faults may lose the one that it is kept for. And it runs what still crashes again
and again, which costs nothing there but a reset of the guest here: a case of 200 lines, of which
three matter, took it 253 runs, 129 of them crashes; this loop 186 and 26, with the same result. It
leaves out records before bytes, and many before few.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import UsageError
from bridge.fuzz.files_text import to_text
from bridge.fuzz.findings import Finding
from bridge.fuzz.repro import CaseRunner, packages_of
from bridge.fuzz.reproducers import make_reproducer
from bridge.fuzz.slot import Slot
from bridge.util.files import write_atomically

__all__ = ["MINIMIZED", "Minimized", "Minimizer", "Written", "minimize_finding", "tries_for"]

_MOST_TRIES: Final = 10
_SURE: Final = 0.95
_SETTLE_SECONDS: Final = 0.1
"""Most cases lead nowhere, and each waits so long. One that leads there later stays larger."""

Progress = Callable[[int, int], object]
"""Told the size of the smallest case so far and how many cases ran, once a second or less."""


def tries_for(same: int, times: int) -> int:
    """Return how often a case must run to show its title with a probability of 95 %.

    Args:
        same: how often it showed, of so many ``times``.

    Raises:
        UsageError: it did not show.
    """
    if not same:
        raise UsageError(
            f"the case did not lead to the finding's title in {times} runs",
            hint="a larger number, -n, shows what happens seldom",
        )
    missed, tries = 1 - same / times, 1
    while missed**tries > 1 - _SURE and tries < _MOST_TRIES:
        tries += 1
    return tries


@dataclass(frozen=True)
class Minimized:
    """The result.

    Attributes:
        case: the smallest case with the title.
        runs: how many cases ran.
        complete: whether nothing more can be left out, or the time was over before.
    """

    case: bytes
    runs: int
    complete: bool


class _TimeOver(Exception):
    """The time is over."""


class Minimizer:
    """Makes one case smaller.

    Args:
        runner: runs cases.
        title: what each smaller case must lead to.
        tries: how often a case is run until it counts as not leading there.
        seconds: when to stop; None for never.
        separator: what stands between two records of a case.
        blank: what takes the place of bytes that do not matter.
        progress: is told how far it is.
    """

    def __init__(
        self,
        runner: CaseRunner,
        title: str,
        *,
        tries: int = 1,
        seconds: float | None = None,
        separator: bytes = b"\n",
        blank: bytes = b"0",
        progress: Progress = lambda size, runs: None,
    ) -> None:
        self._runner = runner
        self._title = title
        self._tries = tries
        self._seconds = seconds
        self._end = float("inf")
        self._separator = separator
        self._blank = blank
        self._progress = progress
        self._told = 0.0
        self._known: dict[bytes, bool] = {}
        self.best = b""
        """The smallest case so far, also after an exception."""

    def minimize(self, case: bytes) -> Minimized:
        """Return the smallest case that is found.

        Raises:
            BridgeError: machines do not start any more; :attr:`best` is what was found before.
        """
        self.best = case
        if self._seconds is not None:
            self._end = time.monotonic() + self._seconds
        try:
            before = None
            while self.best != before:
                before = self.best
                self._records()
                self._bytes()
                self._blanks()
        except _TimeOver:
            return Minimized(self.best, self._runner.runs, complete=False)
        return Minimized(self.best, self._runner.runs, complete=True)

    def _holds(self, case: bytes) -> bool:
        """Whether a case leads to the title; it is the best one then."""
        if case == self.best or case in self._known:
            return case == self.best
        for _ in range(self._tries):
            now = time.monotonic()
            if now > self._end:
                raise _TimeOver
            if now - self._told >= 1.0:
                self._told = now
                self._progress(len(self.best), self._runner.runs)
            if self._runner.run(case).has(self._title):
                self.best = case
                return True
        self._known[case] = False
        return False

    def _records(self) -> None:
        """Leave out records."""
        separator = self._separator
        self._leave_out(self.best.split(separator), separator.join)

    def _bytes(self) -> None:
        """Leave out bytes."""
        self._leave_out([bytes([each]) for each in self.best], b"".join)

    def _leave_out(self, parts: Sequence[bytes], join: Callable[[Sequence[bytes]], bytes]) -> None:
        """Leave out runs of parts: half of them, then a quarter, and so on to single ones."""
        parts = list(parts)
        size = max(1, len(parts) // 2)
        while True:
            at, left_out = 0, False
            while at < len(parts) and len(parts) > 1:
                rest = parts[:at] + parts[at + size :]
                if rest and self._holds(join(rest)):
                    parts, left_out = rest, True
                else:
                    at += size
            if size == 1 and not left_out:
                return
            # Once more with single ones as long as that helps.
            size = max(1, size // 2)

    def _blanks(self) -> None:
        """Put the blank byte where any does."""
        size = max(1, len(self.best) // 2)
        keep = set(self._separator + self._blank)
        while True:
            for at in range(0, len(self.best), size):
                case = self.best
                piece = case[at : at + size]
                blank = bytes(each if each in keep else self._blank[0] for each in piece)
                self._holds(case[:at] + blank + case[at + size :])
            if size == 1:
                return
            size //= 2


# ---- a finding

MINIMIZED: Final = "minimized"
_MINIMIZED_TEXT: Final = "minimized.txt"


@dataclass(frozen=True)
class Written:
    """What was written into the folder of a finding.

    Attributes:
        case: the smallest case.
        files: names, in the folder.
        use: what to do with the reproducer; empty if there is none.
    """

    case: bytes
    runs: int
    complete: bool
    files: tuple[str, ...]
    use: str


def minimize_finding(
    folder: Path,
    finding: Finding,
    case: bytes,
    slot: Slot,
    *,
    times: int,
    timeout: float,
    seconds: float | None = None,
    progress: Progress = lambda size, runs: None,
) -> Written:
    """Minimize the case of a finding and write what comes of it into its folder.

    Args:
        times: how often to run the case at first, to see how often it leads to the title.
        timeout: how long a case may take.
        seconds: when to stop.

    Raises:
        UsageError: the case does not lead to the finding's title.
        BridgeError: guests do not start any more.
        InfrastructureError: the folder cannot be written.
    """
    runner = CaseRunner.of(
        slot, finding, timeout=timeout, packages=packages_of(slot), settle=_SETTLE_SECONDS
    )
    same = sum(attempt.has(finding.title) for attempt in runner.attempts(case, times))
    files = finding.place.harness.split()[:1] == ["files"]
    minimizer = Minimizer(
        runner,
        finding.title,
        tries=tries_for(same, times),
        seconds=seconds,
        blank=b"\0" if files else b"0",
        progress=progress,
    )
    complete = False
    # What was reached is kept, if somebody does not want to wait any longer.
    with contextlib.suppress(KeyboardInterrupt):
        complete = minimizer.minimize(case).complete
    best = minimizer.best
    written = {MINIMIZED: best}
    if files:
        written[_MINIMIZED_TEXT] = to_text(best).encode()
    reproducer = make_reproducer(finding.title, finding.place.harness, finding.place.command, best)
    if reproducer is not None:
        written[reproducer.name] = reproducer.text.encode(errors="backslashreplace")
    for name, content in written.items():
        write_atomically(folder / name, content)
    use = reproducer.use if reproducer is not None else ""
    return Written(best, runner.runs, complete, tuple(written), use)
