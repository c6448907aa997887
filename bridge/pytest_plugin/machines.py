# SPDX-License-Identifier: Apache-2.0
"""The guests of a test run: one for each set of settings, lent to one test after the other."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import pytest

from bridge.errors import (
    BridgeError,
    GuestLostError,
    InfrastructureError,
    MissingDependencyError,
    TargetError,
    UsageError,
)
from bridge.pytest_plugin.request import (
    GuestRequest,
    Machine,
    Reset,
    report_directory,
    request_of,
)
from bridge.results.merge import add_native
from bridge.results.test_record import EVIDENCE_DIRECTORY
from bridge.session.health import (
    CoreDump,
    KernelLog,
    Symptom,
    in_guest,
    new_taint,
    sanitizer_reports,
    symptoms,
)
from bridge.session.session import Session
from bridge.sources.symbolize import NATIVE_FILE
from bridge.targets.faults import TargetFaults
from bridge.trace.call import Call

__all__ = [
    "GivenTarget",
    "Lease",
    "Machines",
    "Options",
    "SickMachineError",
    "StartsFailed",
    "Traced",
    "options_of",
    "warn",
]

logger = logging.getLogger(__name__)

ALIVE: Final = 2
"""How many guests wait for later tests at most; each takes memory."""

_FAILED_STARTS: Final = 2
"""After so many failed starts in a row the test run stops."""


class SickMachineError(GuestLostError):
    """The commands of a test passed, but its guest or its target is not well."""


class StartsFailed(InfrastructureError):
    """Guests do not start: no test that needs one can run."""


@dataclass(frozen=True)
class Options:
    """What the command line says of all guests.

    Attributes:
        overrides: settings that come before those of a test.
        scope: how long a guest lives: ``session``, ``module`` or ``function``.
        ignore: what does not make a test fail.
        keep: which guests outlive their tests: ``always``, ``failed``, or None for none.
        evidence: where what is known of failed tests is kept; None for nowhere.
        native: the file that gets what was covered of native programs; None for nowhere.
        workers: how many processes may start guests at the same time.
    """

    overrides: Mapping[str, object]
    scope: str
    ignore: tuple[re.Pattern[str], ...]
    keep: str | None
    evidence: Path | None = None
    native: Path | None = None
    workers: int = 1


def options_of(config: pytest.Config) -> Options:
    """Read pytest's options and its configuration file.

    Raises:
        pytest.UsageError: ``guest_ignore`` has something that is not a regular expression.
    """
    option = config.option
    overrides = {"image": option.guest_image, "accel": option.guest_accel}
    try:
        ignore = tuple(re.compile(each) for each in config.getini("guest_ignore"))
    except re.error as error:
        raise pytest.UsageError(f"guest_ignore: {error.pattern!r}: {error}") from None
    given = {name: value for name, value in overrides.items() if value is not None}
    report = report_directory(config)
    evidence = report / EVIDENCE_DIRECTORY if report is not None else None
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    native = report / NATIVE_FILE if report is not None else None
    return Options(given, option.guest_scope, ignore, option.guest_keep, evidence, native, workers)


@dataclass(frozen=True)
class GivenTarget:
    """What a test's own fixture ``target`` returned.

    Attributes:
        target: the target.
        lasting: whether later tests may get the same one.
    """

    target: object
    lasting: bool


@dataclass
class _Guest:
    """A session and what is known of its guest."""

    machine: Machine
    session: Session
    log: KernelLog
    module: str
    """The test file for which it became as new the last time."""
    sick: bool = False
    reset_seconds: float = 0.0
    """How long its last reset took; 0 if it was not reset for the last test."""
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class Traced(Protocol):
    """What a test has traced: :class:`bridge.pytest_plugin.Trace`."""

    pcs: list[int]

    @property
    def calls(self) -> list[Call]:
        """The system calls, in the order in which they were entered."""

    def last_calls(self, count: int = 20) -> list[str]:
        """Return the last calls, a line of text each."""


class Lease:
    """A guest, lent to one test.

    Attributes:
        request: what the test asked for.
        session: what the test works with.
        console_start: how many bytes of console output there were when the test began.
        nodeid: the test.
        directory: where what is known of it is kept if it fails; None for nowhere.
        hang: what was found when a command did not end.
    """

    def __init__(
        self,
        machines: Machines,
        guest: _Guest,
        request: GuestRequest,
        log: KernelLog,
        nodeid: str,
    ) -> None:
        self.request = request
        self.nodeid = nodeid
        self.directory = machines.options.evidence
        self.hang: list[tuple[str, str]] = []
        self._machines = machines
        self._guest = guest
        self._checked = False
        self._loss_expected = False
        self._mute: BridgeError | None = None
        """Why the guest does not answer, once it did not."""
        self._log = log
        self._reports: list[str] = []
        """Lines of the commands' output that are reports of sanitizers."""
        self.console_start = guest.session.machine.console.size
        self.reset_seconds = guest.reset_seconds
        """How long the reset before the test took; 0 if there was none."""
        self.traces: list[Traced] = []
        """What the test has traced."""

    @property
    def session(self) -> Session:
        return self._guest.session

    @property
    def properties(self) -> list[tuple[str, object]]:
        """What reports say of the guest."""
        return [
            ("guest_image", self.session.image.name),
            ("guest_kernel", self.session.ready.kernel),
            ("guest_accel", self.session.accelerator.name),
            ("guest_reset_seconds", round(self.reset_seconds, 3)),
        ]

    def kernel_log(self) -> str:
        """Return what the kernel has logged since the test began.

        Raises:
            BridgeError: the guest does not answer.
        """
        log = self._look()
        if self._complaints(log):
            # Also of a test that fails for another reason: no other test is to find it so.
            self._guest.sick = True
        return "\n".join(log.since(self._log))

    def new_cores(self) -> tuple[CoreDump, ...]:
        """Return the core dumps that were made since the test began.

        Raises:
            BridgeError: the guest does not answer.
        """
        return self._look().new_cores(self._log)

    def reset(self) -> None:
        """Return the guest to its ready state, in the middle of a test.

        What the kernel complained about before fails the test now, as its log is gone afterwards.
        """
        self.check()
        self.session.reset()
        self._log = self._guest.log
        self._checked = False
        self._mute = None

    def replace(self) -> None:
        """End the guest and start another in its place."""
        self._guest = self._machines.start(self.request)
        self._log = self._guest.log
        self.console_start = 0
        self._checked = self._loss_expected = False
        self._mute = None

    def used(self) -> None:
        """Note that the guest is used, so that what it says is looked at once more."""
        self._checked = False

    def note_output(self, *outputs: bytes) -> None:
        """Look for reports of sanitizers in what a command in the guest printed."""
        for output in outputs:
            self._reports += sanitizer_reports(output)

    def settle(self) -> None:
        """Note that the test has ended: only what uses the guest from now on is looked at."""
        self._checked = True

    def expect_loss(self) -> None:
        """Note that the test itself has ended the guest, so that this is no fault."""
        self._loss_expected = True

    def check(self) -> None:
        """Look at the guest and its target.

        Raises:
            SickMachineError: one of them is not well. The guest is not used for another test.
            BridgeError: the guest is lost.
        """
        guest = self._guest
        if self._checked:
            return
        self._checked = True
        if (loss := guest.session.machine.loss) is not None:
            if self._loss_expected:
                return
            raise loss
        found: list[Symptom] = []
        evidence = ""
        for fault in self.target_faults():
            line, _, trace = fault.partition("\n")
            found.append(Symptom("the target", line))
            if trace.strip():
                evidence += f"{fault.rstrip()}\n"
        found += in_guest(self._reports, self._ignore)
        self._reports.clear()
        found += self._complaints(self._look())
        if found:
            guest.sick = True
            raise SickMachineError(
                "the commands passed, but the machine is not well:\n"
                + "\n".join(f"  {each}" for each in found),
                evidence=evidence,
                hint="a marker guest(ignore=[...]), or guest_ignore in pytest's configuration, "
                "excludes what is expected",
            )

    def target_faults(self) -> list[str]:
        """Return the exceptions of the target since the last call, with their tracebacks."""
        faults = self._machines.faults.take()
        if self.session.machine.loss is None:
            faults += self.session.target_problems()
        faults = [each for each in faults if not self._ignored(each)]
        if faults:
            # Also of a test that fails for another reason: no other test is to find it so.
            self._guest.sick = True
        return faults

    def watch(self) -> None:
        """Watch the target's threads, whoever else has begun to do so."""
        self._machines.faults.watch()

    def _look(self) -> KernelLog:
        if self._mute is not None:
            raise self._mute  # to find that out takes long enough once
        try:
            return KernelLog.read(self.session.guest)
        except BridgeError as error:
            self._mute = error
            self._guest.sick = True
            raise

    def _ignored(self, text: str) -> bool:
        return any(pattern.search(text) for pattern in self._ignore)

    @property
    def _ignore(self) -> tuple[re.Pattern[str], ...]:
        return (*self._machines.options.ignore, *self.request.ignore)

    def _complaints(self, log: KernelLog) -> list[Symptom]:
        return [
            *symptoms(log.since(self._log), self._ignore),
            *new_taint(self._log.taint, log.taint, self._ignore),
            *in_guest(log.new_cores(self._log), self._ignore),
        ]

    def keep(self) -> None:
        """Have the guest outlive its tests, for the user to look at."""
        self._machines.keep(self._guest)

    def release(self, following: pytest.Item | None) -> None:
        """End the test's use of the guest."""
        self._machines.release(self._guest, self.request, following)


class Machines:
    """The guests that tests share, the one that was used last at the end."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.faults = TargetFaults()
        self._kept: list[_Guest] = []
        self._wanted: Counter[Machine] = Counter()
        self._alive: dict[Machine, _Guest] = {}
        # Of guests that have ended.
        self._lines: dict[str, set[int]] = {}
        self._failed_starts = 0
        self._reason = ""

    def expect(self, items: Sequence[pytest.Item]) -> None:
        """Learn which tests will run: no guest outlives the last test that asks for it."""
        self._wanted.clear()
        for item in items:
            # A wrong request is reported when its test begins.
            with contextlib.suppress(pytest.UsageError):
                self._wanted[request_of(item).machine] += 1

    def lease(self, item: pytest.Item, given: GivenTarget | None = None) -> Lease:
        """Return the guest that a test asks for, started or as new.

        Args:
            given: the target that a fixture of the test returned, if it has one.

        Raises:
            StartsFailed: guests failed to start before.
            BridgeError: it does not start.
        """
        request = request_of(item)
        if given is not None:
            # Nobody could expect it before.
            self._wanted[request.machine] -= 1
            request = request_of(item, given.target)
            self._wanted[request.machine] = 2 if given.lasting else 1
        self.faults.watch()
        guest = self._alive.get(request.machine)
        log = None
        if guest is not None and not guest.sick:
            log = self._ready(guest, request)
        if guest is None or log is None:
            # In the place of the other, if there is one.
            guest = self.start(request)
            log = guest.log
        # The one that was used last is at the end.
        self._alive[request.machine] = self._alive.pop(request.machine)
        return Lease(self, guest, request, log, item.nodeid)

    def _ready(self, guest: _Guest, request: GuestRequest) -> KernelLog | None:
        """Make a guest as new if the test wants that.

        Returns:
            The kernel's log as it is now; None if the guest cannot be used.
        """
        ignore = (*self.options.ignore, *request.ignore)
        for problem in (
            guest.session.target_problems() if guest.session.machine.loss is None else ()
        ):
            # It came after the last look of the test before.
            if not any(pattern.search(problem) for pattern in ignore):
                logger.warning("the guest is replaced: %s", problem.partition("\n")[0])
                return None
        same = request.reset is Reset.MODULE and guest.module == request.module
        guest.reset_seconds = 0.0
        try:
            if request.reset is Reset.NEVER or same:
                # Another test has used it: it may be lost, or not answer.
                guest.session.machine.check()
                log = KernelLog.read(guest.session.guest)
            else:
                began = time.monotonic()
                guest.session.reset()
                guest.reset_seconds = time.monotonic() - began
                log = guest.log
        except UsageError:
            # It was booted, not started from a snapshot.
            return None
        except BridgeError as error:
            logger.warning("the guest is replaced: %s", error.message)
            return None
        guest.module = request.module
        self.faults.take()
        return log

    def start(self, request: GuestRequest) -> _Guest:
        """Start a guest, in the place of another with the same settings.

        Raises:
            StartsFailed: it is not the first that does not start.
            BridgeError: it does not start.
        """
        if self._failed_starts >= _FAILED_STARTS:
            raise StartsFailed(
                f"no guest is started after {_FAILED_STARTS} failed starts in a row: {self._reason}"
            )
        if (old := self._alive.get(request.machine)) is not None:
            self._discard(old)
        while len(self._alive) >= ALIVE:
            self._discard(next(iter(self._alive.values())))
        try:
            guest = self._start(request)
        except (MissingDependencyError, TargetError, UsageError):
            # Another target, or other settings, may do.
            raise
        except BridgeError as error:
            self._failed_starts += 1
            self._reason = error.message
            if self._failed_starts >= _FAILED_STARTS:
                raise StartsFailed(
                    f"{_FAILED_STARTS} guests in a row did not start; the last: {error.message}",
                    evidence=error.evidence,
                    hint=error.hint or "`kcov-bridge doctor` says what this machine lacks",
                ) from error
            raise
        self._failed_starts = 0
        self._alive[request.machine] = guest
        return guest

    def _start(self, request: GuestRequest) -> _Guest:
        with contextlib.ExitStack() as stack:
            target = request.machine.target
            session = stack.enter_context(
                Session(
                    request.settings(self.options.overrides, self.options.workers),
                    target=target.services,
                    target_state=target.state,
                )
            )
            log = KernelLog.read(session.guest)
            guest = _Guest(request.machine, session, log, request.module)
            guest.stack = stack.pop_all()
        return guest

    def keep(self, guest: _Guest) -> None:
        """Take a guest out of use and leave it running until :meth:`close`; the first one only."""
        if not self._kept and guest.session.machine.loss is None:
            self._kept.append(guest)
            self._forget(guest)

    @property
    def kept(self) -> list[Session]:
        """The guests that are to outlive their tests, for the user to look at."""
        guests = [*self._kept, *(self._alive.values() if self.options.keep == "always" else ())]
        return [guest.session for guest in guests if guest.session.machine.loss is None]

    def release(self, guest: _Guest, request: GuestRequest, following: pytest.Item | None) -> None:
        """Close what no later test uses."""
        self._wanted[guest.machine] -= 1
        module = following.nodeid.partition("::")[0] if following is not None else None
        scope = self.options.scope
        ends = scope == "function" or (scope == "module" and module != request.module)
        if (ends or guest.sick) and guest not in self._kept:
            self._discard(guest)
        if following is None and self.options.keep == "always":
            return
        for each in list(self._alive.values()):
            if self._wanted[each.machine] <= 0:
                self._discard(each)

    def take_lines(self) -> dict[str, set[int]]:
        """Return the lines of all targets that ran since the last call, by file."""
        for guest in [*self._alive.values(), *self._kept]:
            self._add_lines(guest)
        lines, self._lines = self._lines, {}
        return lines

    def _add_lines(self, guest: _Guest) -> None:
        for file, lines in guest.session.take_lines().items():
            self._lines.setdefault(file, set()).update(lines)

    def _discard(self, guest: _Guest) -> None:
        self._forget(guest)
        try:
            guest.stack.close()
        except BridgeError as error:
            if error is not guest.session.machine.loss:
                warn(f"a guest did not end in order: {error.report()}")
        finally:
            self._add_lines(guest)
            self._add_native(guest)

    def _add_native(self, guest: _Guest) -> None:
        native = guest.session.native
        if native is None or self.options.native is None:
            return
        try:
            add_native(native.places().table, self.options.native)
        except BridgeError as error:
            warn(f"the report lacks native programs: {error.report()}")

    def _forget(self, guest: _Guest) -> None:
        if self._alive.get(guest.machine) is guest:
            del self._alive[guest.machine]

    def close(self) -> None:
        """End all guests. Safe to call twice."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.faults.close)
            for guest in [*self._alive.values(), *self._kept]:
                stack.callback(self._discard, guest)
            self._kept.clear()


def warn(text: str) -> None:
    """Add to pytest's summary of warnings; no test is left that could fail."""
    # Where warnings are errors, this one would end the run.
    with contextlib.suppress(pytest.PytestWarning):
        warnings.warn(pytest.PytestWarning(text), stacklevel=2)
