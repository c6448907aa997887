# SPDX-License-Identifier: Apache-2.0
"""Runs the case of a finding again, each time from the snapshot, and looks for the same title."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from bridge.config import Settings
from bridge.errors import BridgeError, UsageError
from bridge.fuzz.findings import CASE, Finding, load_finding
from bridge.fuzz.harness import Harness
from bridge.fuzz.lane import Execution
from bridge.fuzz.slot import Slot
from bridge.fuzz.slot_events import Evidence, Suspect
from bridge.fuzz.titles import Fault, Kind, faults_of
from bridge.session.target_host import TargetState
from bridge.targets.scratch import ScratchDirectory

__all__ = ["Attempt", "CaseRunner", "Executes", "open_finding", "packages_of", "wait_seconds"]

SETTLE_SECONDS: Final = 0.3
"""How long to wait for what a case may have left behind: an exception in a thread, a report."""

_LATE: Final = (Kind.KERNEL, Kind.TARGET_DEATH, Kind.TARGET_EXCEPTION, Kind.TARGET_MEMORY)
"""What may show after the case has ended."""
_POLL_SECONDS: Final = 0.005
_HUNG_TASK_SECONDS: Final = 45.0
"""A task is reported as hung after twice the 20 s of the setting ``diagnose`` at the latest."""


class Executes(Protocol):
    """What runs cases: :class:`bridge.fuzz.slot.Slot`."""

    def execute(self, case: bytes, timeout: float) -> Execution:
        """Execute a case."""

    def trouble(self) -> bool:
        """Return whether something is wrong with guest or target now."""

    def collect(self, *, timed_out: bool) -> Evidence:
        """Return what is known of guest and target."""

    def reset(self, reason: str) -> None:
        """Bring guest and target back to the ready state."""


@dataclass(frozen=True)
class Attempt:
    """What a case led to this time.

    Attributes:
        faults: the cause first; empty if nothing was wrong.
    """

    suspect: Suspect
    faults: tuple[Fault, ...]
    seconds: float

    def has(self, title: str) -> bool:
        """Whether one of the faults has this title."""
        return any(fault.title == title for fault in self.faults)

    @property
    def title(self) -> str:
        """Of the cause; empty if nothing was wrong."""
        return self.faults[0].title if self.faults else ""


def wait_seconds(finding: Finding, timeout: float) -> float:
    """Return how long a case may take when it is run for a finding."""
    hung = finding.kind is Kind.KERNEL and finding.timed_out
    return max(timeout, _HUNG_TASK_SECONDS) if hung else timeout


class CaseRunner:
    """Runs cases for one finding.

    Args:
        slot: what executes them; the guest is as new.
        timeout: how long a case may take, in seconds.
        packages: what the target runs.
        settle: how long to wait for what a case leaves behind.
    """

    def __init__(
        self,
        slot: Executes,
        *,
        timeout: float,
        packages: Sequence[str] = (),
        settle: float = SETTLE_SECONDS,
    ) -> None:
        self.slot = slot
        self._timeout = timeout
        self._packages = packages
        self._settle = settle
        self.runs = 0
        """How many cases ran."""
        self.resets = 0
        """How often the guest went back to the snapshot."""

    @classmethod
    def of(
        cls,
        slot: Executes,
        finding: Finding,
        *,
        timeout: float,
        packages: Sequence[str] = (),
        settle: float = SETTLE_SECONDS,
    ) -> CaseRunner:
        """Return one with the times that a finding needs."""
        return cls(
            slot,
            timeout=wait_seconds(finding, timeout),
            packages=packages,
            settle=settle if finding.kind in _LATE else 0.0,
        )

    def run(self, case: bytes, *, reset: bool = False) -> Attempt:
        """Run a case and judge it; the guest is as new afterwards if it was not well.

        Args:
            reset: whether the guest is to be as new afterwards in any case.

        Raises:
            BridgeError: machines do not start any more.
        """
        began = time.monotonic()
        self.runs += 1
        status, output, timed_out, lost = 0, b"", False, False
        pcs: tuple[tuple[int, ...], ...] = ()
        done: Execution | None = None
        try:
            done = self.slot.execute(case, self._timeout)
        except BridgeError:
            lost = True  # the evidence says why
        if done is not None:
            timed_out = done.status is None
            status, output, pcs = done.status or 0, done.output, done.pcs
        wrong = bool(status) or timed_out or lost or self._settled_trouble()
        evidence = self.slot.collect(timed_out=timed_out) if wrong else Evidence()
        ended = done is not None and not timed_out
        suspect = Suspect(case, status if ended else None, output, timed_out, evidence, pcs)
        faults = tuple(faults_of(suspect, self._packages)) if wrong else ()
        seconds = time.monotonic() - began
        if wrong or reset:
            self.resets += 1
            self.slot.reset("repro")
        return Attempt(suspect, faults, seconds)

    def _settled_trouble(self) -> bool:
        end = time.monotonic() + self._settle
        while not self.slot.trouble():
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def attempts(self, case: bytes, times: int) -> Iterator[Attempt]:
        """Run a case so often, each time in a guest as new."""
        for _ in range(times):
            yield self.run(case, reset=True)


# ---- a slot like that of the campaign


@contextlib.contextmanager
def open_finding(folder: Path) -> Iterator[tuple[Finding, bytes, Slot]]:
    """Start a slot with the settings of a finding; yields the finding, its case and the slot.

    Raises:
        UsageError: the folder is not one of a finding, or what it names is not there any more.
        BridgeError: the slot does not start.
    """
    finding = load_finding(folder)
    try:
        case = (folder / CASE).read_bytes()
    except OSError as error:
        raise UsageError(f"the case of {folder} cannot be read: {error.strerror}") from error
    place = finding.place
    # As in a campaign: reports of the kernel are noticed at once then.
    settings = Settings.of(place.settings).replace(diagnose=True)
    harness = Harness.parse(
        place.harness,
        place.command,
        differential=place.differential,
        ignore=place.ignore,
        libraries=[Path(each) for each in place.libraries],
        exit_status=place.exit_status,
        settings=settings,
    )
    with contextlib.ExitStack() as stack:
        scratch = ScratchDirectory("repro")
        stack.callback(scratch.remove)
        slot = Slot(settings, harness, scratch.make(), target_state=TargetState(place.target_state))
        yield finding, case, stack.enter_context(slot)


def packages_of(slot: Slot) -> tuple[str, ...]:
    """Return the packages that a slot's target runs."""
    source = slot.session.source
    return tuple(source.packages) if source is not None else ()
