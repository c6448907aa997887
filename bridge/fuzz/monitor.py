# SPDX-License-Identifier: Apache-2.0
"""Watches a slot's machine and target, and collects what is known before anything is killed.

With the setting ``diagnose`` the guest's kernel writes warnings to the console too, so that they
are noticed at once; without it they are found in its log, when something else makes the slot look.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

from bridge.errors import BridgeError
from bridge.fuzz.slot_events import Evidence
from bridge.fuzz.titles import memory_problem
from bridge.session.evidence import guest_processes
from bridge.session.health import KERNEL_COMPLAINTS, KernelLog
from bridge.session.session import Session
from bridge.targets.faults import TargetFaults

__all__ = ["MachineMonitor", "resident"]

_BEGIN_SECONDS: Final = 30.0
"""How long a guest may take to answer when nothing is wrong: this machine may be busy."""
_LOOK_SECONDS: Final = 5.0
"""How long a guest may take to answer after something went wrong."""
_STEP_SECONDS: Final = 0.02
_LATER_SECONDS: Final = 0.5
"""Between the two looks at a target that may hang."""
_SETTLE_SECONDS: Final = 0.3
"""After so long without a word the kernel's report is complete."""
_REPORT_SECONDS: Final = 3.0
_LINE_BYTES: Final = 256
_ABORT_SECONDS: Final = 2.0
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class MachineMonitor:
    """Watches one session after another, on the slot's thread.

    Args:
        memory: MiB that the target may take; 0 for no limit.
    """

    def __init__(self, *, memory: int = 0) -> None:
        self._memory = memory
        self._faults = TargetFaults()
        self._session: Session | None = None
        self._log: KernelLog | None = None
        self._console_start = 0
        self._seen = 0
        self._complained = False
        self._complained_at = 0.0
        self._pid: int | None = None
        self._fault_count = 0

    def __enter__(self) -> MachineMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End watching. Safe to call twice."""
        self._faults.close()

    def began(self, session: Session) -> None:
        """Begin with a guest that was started, or reset: what happened before is forgotten.

        Raises:
            BridgeError: the guest does not answer.
        """
        self._faults.watch()
        self._faults.take()
        session.target_problems()
        if session is not self._session:
            # A reset brings the log back to where it was.
            self._log = KernelLog.read(session.guest, _BEGIN_SECONDS)
        self._console_start = self._seen = session.machine.console.size
        self._complained = False
        self._pid = session.target_pid
        self._fault_count = session.target_fault_count
        self._session = session

    def trouble(self) -> bool:
        """Return whether something is wrong now; takes no longer than a look at some counters."""
        session = self._session
        if session is None:
            return False
        return (
            session.machine.loss is not None
            or self._console_complains(session)
            or self._faults.waiting
            or session.target_fault_count != self._fault_count
            or (self._pid is not None and _died(self._pid))
            or self._too_much_memory(session)
        )

    def collect(self, *, timed_out: bool) -> Evidence:
        """Return what is known of guest and target, before anything is killed.

        A guest or a target that does not answer costs some seconds, and is no error.

        Args:
            timed_out: whether the case did not end in time: what it waits for is of interest then.
        """
        session = self._session
        if session is None:
            return Evidence()
        stacks = later = ""
        if timed_out:
            # First, as they may go on.
            stacks = session.target_stacks()
            second = time.monotonic() + _LATER_SECONDS
            if session.machine.loss is None:
                with contextlib.suppress(BridgeError):
                    stacks = f"{guest_processes(session, _LOOK_SECONDS)}\n{stacks}"
            time.sleep(max(0.0, second - time.monotonic()))
            later = session.target_stacks()
        console = self._settled_console(session)
        loss = session.machine.loss
        log = ""
        if loss is None:
            with contextlib.suppress(BridgeError):
                log = self._new_log(session)
            loss = session.machine.loss
        return Evidence(
            console=console,
            dmesg=log,
            lost=loss.report() if loss is not None else "",
            problems=tuple(self._problems(session)),
            stacks=stacks,
            later=later,
        )

    def _problems(self, session: Session) -> list[str]:
        problems = self._faults.take()
        pid = session.target_pid
        ate = pid is not None and self._too_much_memory(session)
        if ate and pid is not None:
            # At once: it may be too busy to answer, and take more meanwhile.
            _abort(pid)
        with contextlib.suppress(BridgeError):
            problems += session.target_problems()
        if ate:
            # Where it was when it was ended is in what is said of its end.
            end = next((each for each in problems if "SIGABRT" in each.partition("\n")[0]), "")
            kept = [each for each in problems if each != end]
            problems = [memory_problem(self._memory, end.partition("\n")[2]), *kept]
        return problems

    def _new_log(self, session: Session) -> str:
        log = KernelLog.read(session.guest, _LOOK_SECONDS)
        before = self._log
        return "\n".join(log.since(before) if before is not None else log.lines)

    def _settled_console(self, session: Session) -> str:
        """Return the console since the reset, once a report that is being written is complete."""
        console = session.machine.console
        end = time.monotonic() + _SETTLE_SECONDS
        size = console.size
        while self._complained and time.monotonic() < end:
            time.sleep(_STEP_SECONDS)
            if console.size != size:
                size, end = console.size, time.monotonic() + _SETTLE_SECONDS
            if time.monotonic() - self._complained_at > _REPORT_SECONDS:
                break  # it writes without end
        return console.since(self._console_start)

    def _console_complains(self, session: Session) -> bool:
        """Look at what the console wrote since the last look."""
        if self._complained:
            return True
        size = session.machine.console.size
        if size == self._seen:
            return False
        # A line may have come in two pieces.
        text = session.machine.console.since(max(self._console_start, self._seen - _LINE_BYTES))
        self._seen = size
        if KERNEL_COMPLAINTS.search(text) is not None:
            self._complained = True
            self._complained_at = time.monotonic()
        return self._complained

    def _too_much_memory(self, session: Session) -> bool:
        pid = session.target_pid
        return self._memory > 0 and pid is not None and resident(pid) > self._memory << 20


def resident(pid: int) -> int:
    """Return how many bytes a process has in memory; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def _abort(pid: int) -> None:
    """End a process that writes where it is when it gets SIGABRT."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGABRT)
        end = time.monotonic() + _ABORT_SECONDS
        while not _died(pid) and time.monotonic() < end:
            time.sleep(_STEP_SECONDS)
        os.kill(pid, signal.SIGKILL)


def _died(pid: int) -> bool:
    """Whether a process has ended, also if nobody waited for it yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    return stat[stat.rindex(b")") + 2 :][:1] in b"ZX"
