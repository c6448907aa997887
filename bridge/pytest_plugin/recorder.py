# SPDX-License-Identifier: Apache-2.0
"""What a test run leaves behind: the record of its tests, and the lines that they reached.

Each process of a run has one recorder. Under pytest-xdist a worker writes the record of its own
tests; the lines of a test go to the controller with the test's report, so that those of a worker
that dies later are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

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
from bridge.pytest_plugin.request import report_directory
from bridge.results.test_record import (
    EVIDENCE_DIRECTORY,
    FailureKind,
    Outcome,
    RecordedTest,
    RecordWriter,
    remove_records,
)
from bridge.session.session import Session
from bridge.sources.symbolize import NATIVE_FILE
from bridge.trace import TraceHeader, TraceWriter
from bridge.trace.trace_file import TRACE_FILE

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
    directory = report_directory(config)
    if directory is None or hasattr(config, "workerinput"):
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_records(directory)
        traces = directory.glob("trace.*.jsonl")
        for path in (
            *traces,
            *(directory / name for name in (TRACE_FILE, _COVERAGE_FILE, NATIVE_FILE, _PAGE)),
        ):
            path.unlink(missing_ok=True)
        shutil.rmtree(directory / EVIDENCE_DIRECTORY, ignore_errors=True)
    except BridgeError as error:
        raise pytest.UsageError(f"--guest-report: {error.report()}") from None
    except OSError as error:
        raise pytest.UsageError(
            f"--guest-report: {directory} cannot be used: {error.strerror}"
        ) from None


@dataclass
class _Progress:
    """A test whose teardown has not ended."""

    began: float = 0.0
    seconds: float = 0.0
    outcome: Outcome = Outcome.PASSED
    kind: FailureKind | None = None
    message: str = ""


@dataclass(frozen=True)
class _Figures:
    """What a session counted."""

    pcs: int = 0
    lost: int = 0


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


class _Files:
    """What one process writes into the directory of the report.

    Raises:
        InfrastructureError: a file cannot be written; from the methods.
    """

    def __init__(self, directory: Path, worker: str) -> None:
        self.directory = directory
        self.coverage_file = directory / _COVERAGE_FILE
        self.page = directory / _PAGE
        self._worker = worker
        self._stack = contextlib.ExitStack()
        self._records: RecordWriter | None = None
        self._calls: TraceWriter | None = None

    def write(self, record: RecordedTest) -> None:
        """Add a test to the record."""
        if self._records is None:
            self._records = self._stack.enter_context(RecordWriter(self.directory, self._worker))
        self._records.write(record)

    def write_calls(self, test: str, lease: Lease) -> int:
        """Add the calls that a test traced, and return how many there are."""
        if self._calls is None:
            name = f"trace.{self._worker}.jsonl" if self._worker else TRACE_FILE
            writer = TraceWriter(self.directory / name, _header(lease.session))
            self._calls = self._stack.enter_context(writer)
        calls = [call for traced in lease.traces for call in traced.calls]
        self._calls.write_all(dataclasses.replace(call, test=test) for call in calls)
        return len(calls)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


class Recorder:
    """The recorder of this process.

    Args:
        config: pytest's.
        context: the context of lines that run from now on; see :mod:`.coverage`.

    Attributes:
        coverage_file: where ``--guest-cov`` has written lines; None if it has not.
        joined: whether lines were added to the data of a coverage.py that measures this process.
        page: the page of ``--guest-report``, made at the end of the run; None if there is none.
    """

    def __init__(self, config: pytest.Config, context: str) -> None:
        self._config = config
        self._context = context
        self._machines: Machines | None = None
        worker_input = getattr(config, "workerinput", None)
        self._worker: str | None = worker_input["workerid"] if worker_input is not None else None
        directory = report_directory(config)
        self._files = _Files(directory, self._worker or "") if directory is not None else None
        self._sends = (
            worker_input is not None
            and worker_input.get(plugin.LINES, False)
            and (self._files is not None or active_coverage() is None)
        )
        self._lines = ContextLines()
        self._unsent = ContextLines()
        # The figures of a session up to the last test.
        self._figures: WeakKeyDictionary[Session, _Figures] = WeakKeyDictionary()
        self._tests: dict[str, _Progress] = {}
        self._seen = _Seen()
        self.coverage_file: Path | None = None
        self.joined = False
        self.incomplete = False
        self.page = self._files.page if self._files is not None else None

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
        if self._files is None:
            return
        lines = self._lines.context(f"{test}|run")
        record = RecordedTest(
            test=test,
            outcome=progress.outcome,
            kind_of_failure=progress.kind,
            seconds=progress.seconds,
            began=progress.began,
            worker=self._worker or "",
            lines=_sorted(lines),
            new_lines=_sorted(self._seen.add(lines)),
            message=progress.message,
        )
        with self._warned():
            if lease is not None:
                guest = dict(lease.properties)
                figures = self._figures_of(lease.session)
                record = dataclasses.replace(
                    record,
                    seconds=max(0.0, progress.seconds - lease.reset_seconds),
                    reset_seconds=lease.reset_seconds,
                    image=str(guest["guest_image"]),
                    kernel=str(guest["guest_kernel"]),
                    accelerator=str(guest["guest_accel"]),
                    calls=self._files.write_calls(test, lease) if lease.traces else None,
                    pcs=figures.pcs,
                    lost=figures.lost,
                )
            self._files.write(record)

    def _figures_of(self, session: Session) -> _Figures:
        """Return what a session counted since the last test."""
        stats = session.stats()
        now = _Figures(stats.pcs, stats.lost_pcs + stats.lost_comparisons + stats.untraced)
        before = self._figures.get(session, _Figures())
        self._figures[session] = now
        return _Figures(max(0, now.pcs - before.pcs), max(0, now.lost - before.lost))

    # The end

    def finish(self) -> None:
        """Add the lines to the coverage data that the user wants; when the last test has ended."""
        self._take()
        with self._warned(), contextlib.ExitStack() as stack:
            if self._files is not None:
                stack.callback(self._files.close)
            if self._sends:
                self._config.workeroutput[plugin.LINES] = self._send()  # type: ignore[attr-defined]
            active = active_coverage()
            if active is not None and self._lines:
                join(active, self._lines)
                self.joined = True
            if self._worker is None:
                self._write_coverage(alone=active is None)
        if self._worker is not None and self.incomplete:
            self._config.workeroutput[plugin.INCOMPLETE] = True  # type: ignore[attr-defined]

    def _write_coverage(self, *, alone: bool) -> None:
        if self._config.option.guest_cov and alone and self._lines:
            self.coverage_file = write_configured(self._lines)
        if self._files is not None:
            write(self._lines, self._files.coverage_file)

    def write_page(self) -> None:
        """Write the report's page; when all processes have ended."""
        files, self.page = self._files, None
        if files is None or self._worker is not None:
            return
        if not self._lines and not any(files.directory.glob("*.jsonl")):
            # No test ran.
            return
        # Imported here, for runs without a report.
        from bridge.results.coverage_files import HTML_DIRECTORY, make_html
        from bridge.results.report.page import write_report

        with self._warned():
            if self._lines:
                make_html(files.coverage_file, files.directory / HTML_DIRECTORY, contexts=True)
            write_report(files.directory, files.page)
            self.page = files.page

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        """Make errors warnings: a result that is missing fails the run, and no test."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except BridgeError as error:
                self.incomplete = True
                warn(error.report())
        for each in caught:
            # Where warnings are errors, this one would end the run.
            with contextlib.suppress(Warning):
                self._config.issue_config_time_warning(each.message, stacklevel=2)  # type: ignore[arg-type]


def _header(session: Session) -> TraceHeader:
    sources = {"kernel": session.kernel, "python": session.source}
    return TraceHeader(
        source=",".join(name for name, source in sources.items() if source is not None),
        image=session.image.name,
        kernel=session.ready.kernel,
    )


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
