# SPDX-License-Identifier: Apache-2.0
"""What a test run leaves behind: the record of its tests, and the lines that they reached.

Each process of a run has one recorder. Under pytest-xdist a worker writes the record of its own
tests; the lines of a test go to the controller with the test's report, so that those of a worker
that dies later are there.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from bridge.errors import BridgeError
from bridge.pytest_plugin import plugin
from bridge.pytest_plugin.coverage import (
    ContextLines,
    active_coverage,
    join,
    write,
    write_configured,
)
from bridge.pytest_plugin.machines import Lease, Machines, warn
from bridge.pytest_plugin.reports import add_extras
from bridge.results.test_record import (
    FailureKind,
    Outcome,
    RecordedTest,
    RecordWriter,
    remove_records,
)

__all__ = ["Recorder", "prepare"]

_COVERAGE_FILE: Final = ".coverage"
_PAGE: Final = "report.html"
_MESSAGE: Final = 2000
"""How many characters of a message the record keeps."""


def prepare(config: pytest.Config) -> None:
    """Make the directory of the report, without what an earlier run left in it.

    Raises:
        pytest.UsageError: it cannot be made or changed.
    """
    directory = _directory(config)
    if directory is None or hasattr(config, "workerinput"):
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_records(directory)
        (directory / _COVERAGE_FILE).unlink(missing_ok=True)
    except BridgeError as error:
        raise pytest.UsageError(f"--guest-report: {error.report()}") from None
    except OSError as error:
        raise pytest.UsageError(
            f"--guest-report: {directory} cannot be used: {error.strerror}"
        ) from None


def _directory(config: pytest.Config) -> Path | None:
    # A worker may run in another directory.
    worker_input = getattr(config, "workerinput", {})
    given = worker_input.get(plugin.REPORT) or config.option.guest_report
    return Path(config.invocation_params.dir, given).absolute() if given else None


@dataclass
class _Progress:
    """A test whose teardown has not ended."""

    began: float = 0.0
    seconds: float = 0.0
    outcome: Outcome = Outcome.PASSED
    kind: FailureKind | None = None
    message: str = ""


@dataclass
class _Seen:
    """The lines that tests of this process reached."""

    lines: dict[str, set[int]] = field(default_factory=dict)

    def add(self, lines: Mapping[str, set[int]]) -> dict[str, set[int]]:
        """Add lines, and return those that are new."""
        new = {}
        for file, numbers in lines.items():
            before = self.lines.setdefault(file, set())
            if added := numbers - before:
                new[file] = added
                before |= added
        return new


class Recorder:
    """The recorder of this process.

    Args:
        config: pytest's.
        context: the context of lines that run from now on; see :mod:`.coverage`.

    Attributes:
        coverage_file: where ``--guest-cov`` has written lines; None if it has not.
    """

    def __init__(self, config: pytest.Config, context: str) -> None:
        self._config = config
        self._context = context
        self._machines: Machines | None = None
        worker_input = getattr(config, "workerinput", None)
        self._worker: str | None = worker_input["workerid"] if worker_input is not None else None
        self._directory = _directory(config)
        self._sends = (
            worker_input is not None
            and worker_input.get(plugin.LINES, False)
            and (self._directory is not None or active_coverage() is None)
        )
        self._lines = ContextLines()
        self._unsent = ContextLines()
        self._writer: RecordWriter | None = None
        self._tests: dict[str, _Progress] = {}
        self._seen = _Seen()
        self.coverage_file: Path | None = None

    @property
    def page(self) -> Path | None:
        """The page of ``--guest-report``, made at the end of the run; None without it."""
        return self._directory / _PAGE if self._directory is not None else None

    # Lines

    def watch(self, machines: Machines) -> None:
        """Take the lines of the targets of guests."""
        self._machines = machines

    def enter(self, context: str) -> None:
        """Have lines that run from now on belong to another context."""
        self._take()
        self._context = context

    def receive(self, lines: Mapping[str, Mapping[str, list[int]]]) -> None:
        """Add the lines that a worker sent."""
        self._lines.update(lines)

    def _take(self) -> None:
        if self._machines is None:
            return
        lines = self._machines.take_lines()
        self._lines.add(self._context, lines)
        if self._sends:
            self._unsent.add(self._context, lines)

    def _send(self) -> dict[str, dict[str, list[int]]]:
        unsent, self._unsent = self._unsent, ContextLines()
        return unsent.plain()

    # Tests

    def note(
        self,
        report: pytest.TestReport,
        began: float,
        kind: FailureKind | None,
        lease: Lease | None,
    ) -> None:
        """Note the report of one phase of a test that ran in this process.

        Args:
            report: after the teardown it gets the lines that the controller wants.
            began: when the phase began, in seconds since the epoch.
            kind: what made it fail.
            lease: the test's guest.
        """
        if report.when == "setup":
            self._tests[report.nodeid] = _Progress(began)
        progress = self._tests.setdefault(report.nodeid, _Progress(began))
        progress.seconds += report.duration
        if report.failed and progress.outcome is not Outcome.FAILED:
            progress.outcome = Outcome.FAILED if report.when == "call" else Outcome.ERROR
            progress.kind = progress.kind or kind
            progress.message = progress.message or _message(report)
        elif report.skipped:
            progress.outcome = Outcome.SKIPPED
            progress.message = _message(report)
        if report.when != "teardown":
            return
        del self._tests[report.nodeid]
        self._take()
        if lease is not None:
            lines = self._lines.context(f"{report.nodeid}|run")
            add_extras(report, self._config, lease, lines, self.page)
        self._write_record(report.nodeid, progress, lease)
        if self._sends and self._unsent:
            setattr(report, plugin.LINES, self._send())

    def note_crash(self, report: pytest.TestReport) -> None:
        """Note a test whose worker died; no other process can."""
        progress = _Progress(
            getattr(report, "start", 0.0),
            report.duration,
            Outcome.FAILED,
            FailureKind.ASSERTION,
            _message(report),
        )
        self._write_record(report.nodeid, progress, None)

    def _write_record(self, test: str, progress: _Progress, lease: Lease | None) -> None:
        if self._directory is None:
            return
        lines = self._lines.context(f"{test}|run")
        reset_seconds = lease.reset_seconds if lease is not None else 0.0
        guest = dict(lease.properties) if lease is not None else {}
        record = RecordedTest(
            test=test,
            outcome=progress.outcome,
            kind_of_failure=progress.kind,
            seconds=max(0.0, progress.seconds - reset_seconds),
            reset_seconds=reset_seconds,
            began=progress.began,
            image=str(guest.get("guest_image", "")),
            kernel=str(guest.get("guest_kernel", "")),
            accelerator=str(guest.get("guest_accel", "")),
            worker=self._worker or "",
            lines=_sorted(lines),
            new_lines=_sorted(self._seen.add(lines)),
            message=progress.message,
        )
        with self._warned():
            if self._writer is None:
                self._writer = RecordWriter(self._directory, self._worker or "")
            self._writer.write(record)

    # The end

    def finish(self) -> None:
        """Add the lines to the coverage data that the user wants; when the last test has ended."""
        self._take()
        with self._warned(), contextlib.ExitStack() as stack:
            if self._writer is not None:
                stack.callback(self._writer.close)
                self._writer = None
            if self._sends:
                self._config.workeroutput[plugin.LINES] = self._send()  # type: ignore[attr-defined]
            active = active_coverage()
            if active is not None and self._lines:
                join(active, self._lines)
            if self._worker is not None:
                return
            if self._config.option.guest_cov and active is None:
                self.coverage_file = write_configured(self._lines)
            if self._directory is not None:
                write(self._lines, self._directory / _COVERAGE_FILE)

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        """Make errors warnings: results that are missing are no failure of a test."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except BridgeError as error:
                warn(error.report())
        for each in caught:
            # Where warnings are errors, this one would end the run.
            with contextlib.suppress(Warning):
                self._config.issue_config_time_warning(each.message, stacklevel=2)  # type: ignore[arg-type]


def _sorted(lines: Mapping[str, set[int]]) -> dict[str, tuple[int, ...]]:
    return {file: tuple(sorted(numbers)) for file, numbers in sorted(lines.items())}


def _message(report: pytest.TestReport) -> str:
    """Return why a test failed or was skipped, without the lines of its source."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):
        return longrepr[2].removeprefix("Skipped: ")[:_MESSAGE]
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash is not None else getattr(report, "wasxfail", "") or str(longrepr)
    return text[:_MESSAGE]
