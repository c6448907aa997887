# SPDX-License-Identifier: Apache-2.0
"""Reads what a report is made of: the directories of runs, and those of pytest runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bridge.errors import BridgeError, InfrastructureError, UsageError
from bridge.results import summary
from bridge.results.code_file import CodeFile
from bridge.results.coverage_files import HTML_DIRECTORY
from bridge.results.native_export import MANY_BLOCKS, add_files
from bridge.results.report.host import (
    COVERAGE_FILE,
    HostData,
    SourceFile,
    find_paths,
    join_coverage,
    measured_files,
    native_files,
)
from bridge.results.report.pcs import PCS_FILE, PcFigures, TSeries, thin_out
from bridge.results.run_directory import load_native
from bridge.results.test_record import RECORD_FILE, RecordedTest, read_records, record_files
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.native.modules import ModuleIdentity, ModuleTable
from bridge.sources.symbolize import NATIVE_FILE
from bridge.trace import Call, TraceHeader, read_traces
from bridge.trace.perfetto import PERFETTO_FILE
from bridge.trace.trace_file import TRACE_FILE

__all__ = ["Report", "RunDirectory", "SyscallFigures", "gather"]

_log = logging.getLogger(__name__)

_SUMMARY_FILE: Final = "summary.json"

_LOSSES: Final = {
    "lost_pcs": "PCs were dropped, because the area was full",
    "lost_comparisons": "comparisons were dropped, because the area was full",
    "untraced": "processes or threads could not be traced",
    "guest_timeouts": "requests of the guest were not answered in time",
    "guest_skipped": "returns were not reported, because the guest took the host for gone",
    "source_failures": "times a source of coverage failed",
    "tracer_faults": "times the tracer failed; a line may be missing each time",
}
"""Figures of a summary that are 0 if nothing was lost, and what they count."""

_PERCEPTIBLE_BYTES: Final = 16 << 20
"""Reading that many takes longer than a moment."""


@dataclass(slots=True)
class RunDirectory:
    """What one directory has."""

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)
    """Empty if it has none, as that of a pytest run."""
    pcs: PcFigures = field(default_factory=PcFigures)
    traces: list[TraceHeader] = field(default_factory=list)
    html: Path | None = None
    """Start page of coverage.py's own report, if it has one."""
    perfetto: Path | None = None
    """The trace as Perfetto reads it, if there is one."""


@dataclass(slots=True)
class SyscallFigures:
    """What the calls of one name did together."""

    name: str
    calls: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    host_calls: int = 0
    """How many of them reached lines of the host."""
    lines: set[tuple[str, int]] = field(default_factory=set)
    """Statements that they reached: paths and lines."""
    kernel: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Report:
    """All that a report shows."""

    runs: list[RunDirectory] = field(default_factory=list)
    tests: list[RecordedTest] = field(default_factory=list)
    """In the order in which they began."""
    files: list[SourceFile] = field(default_factory=list)
    """Of the host: Python's, then those of native programs."""
    native: dict[str, CodeFile] = field(default_factory=dict)
    """Lines and functions of native programs, by path."""
    native_covered: dict[ModuleIdentity, bytes] = field(default_factory=dict)
    """Of each native module: a byte for each block, 1 if it was covered."""
    lines_by_test: dict[str, dict[str, set[int]]] = field(default_factory=dict)
    """Statements that each test reached, by path."""
    calls: list[tuple[int, Call]] = field(default_factory=list)
    """Each with the number of its trace, in the order in which they were entered."""
    paths: dict[str, str] = field(default_factory=dict)
    """Path of each file that the calls and the record of tests name."""
    syscalls: list[SyscallFigures] = field(default_factory=list)
    """The most frequent first."""
    lines_over_time: TSeries = field(default_factory=list)
    """Statements of the host over the seconds of the trace."""
    kernel_over_time: TSeries = field(default_factory=list)
    """Functions of the kernel over the seconds of the trace."""
    lines_over_tests: TSeries = field(default_factory=list)
    """Statements of the host over the number of tests."""
    hot_lines: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many calls reached each statement."""
    losses: list[str] = field(default_factory=list)
    """What was lost; one sentence each."""
    loss_known: bool = False
    """Whether the figures would tell that something was lost."""
    problems: list[str] = field(default_factory=list)
    """What of the report itself is missing, and why."""


@contextlib.contextmanager
def gather(directories: Sequence[Path]) -> Iterator[tuple[Report, HostData]]:
    """Read the directories; the joined coverage data lives as long as the block.

    A trace whose end is damaged, sources that are gone and the like are no errors: the report says
    so in ``problems``.

    Raises:
        UsageError: a directory does not exist, or none has anything to report.
        BridgeError: a file is damaged, of another version, or not what its name says.
    """
    report = Report()
    data_files = []
    traced: list[tuple[int, Call]] = []
    traces = 0
    recorded: list[RecordedTest] = []
    for path in dict.fromkeys(each.absolute() for each in directories):
        run = _read_run(path, report)
        report.runs.append(run)
        if (path / COVERAGE_FILE).is_file():
            data_files.append(path / COVERAGE_FILE)
        records = read_records(path)
        recorded += records.tests
        report.problems += records.problems
        traced += _read_calls(
            path, run, report, traces, max(map(_returned_of, traced), default=0.0)
        )
        traces += len(run.traces)
    recorded.sort(key=lambda test: test.began)
    traced.sort(key=lambda each: each[1].start)
    _note_losses(report, recorded)
    known = measured_files(data_files)
    names = {name for test in recorded for name in test.lines}
    names |= {code.file for _, call in traced for code in call.host}
    paths = report.paths = find_paths(names, known)
    tests = [
        (test.test, {paths[name]: numbers for name, numbers in test.lines.items()})
        for test in recorded
    ]
    with join_coverage(data_files, tests) as host:
        written = [path.stat().st_mtime for path in data_files]
        report.files = host.files(max(written, default=None))
        report.files += _native_files(report)
        report.tests = recorded
        by_path = {file.path: file for file in report.files}
        _add_lines_of_tests(report, host, by_path)
        report.calls = traced
        _add_figures_of_calls(report, by_path)
        yield report, host


def _native_files(report: Report) -> list[SourceFile]:
    """Read the native modules of all runs into ``native``; return their files for the page."""
    written = []
    for run in report.runs:
        places = load_native(run.path)
        if places is not None:
            _announce_blocks(len(places.table))
            add_files(report.native, places)
            _add_covered(report.native_covered, places.table)
            written.append((run.path / NATIVE_FILE).stat().st_mtime)
    return native_files(report.native, max(written, default=0.0))


def _add_covered(covered: dict[ModuleIdentity, bytes], table: ModuleTable) -> None:
    """Add the covered blocks of a run, by what makes modules of several runs the same."""
    for module in table:
        now = int.from_bytes(module.covered.ljust(module.count, b"\0"), "big")
        now |= int.from_bytes(covered.get(module.identity, b""), "big")
        covered[module.identity] = now.to_bytes(module.count, "big")


def _announce_blocks(blocks: int) -> None:
    if blocks > MANY_BLOCKS:
        _log.info("reading the lines of %d native blocks", blocks)


def _read_run(path: Path, report: Report) -> RunDirectory:
    if not path.is_dir():
        raise UsageError(
            f"there is no directory {path}",
            hint="name the directory of a `kcov-bridge run` (--out) or of a pytest run "
            "(--guest-report)",
        )
    run = RunDirectory(path)
    names = (_SUMMARY_FILE, PCS_FILE, COVERAGE_FILE, SYMBOLS_FILE, NATIVE_FILE)
    if not any((path / name).is_file() for name in names) and not (
        record_files(path) or any(path.glob("trace*.jsonl"))
    ):
        raise UsageError(
            f"{path} has nothing to report: no {_SUMMARY_FILE}, {COVERAGE_FILE}, {RECORD_FILE} or "
            f"{TRACE_FILE}",
            hint="name the directory of a finished run",
        )
    if (path / _SUMMARY_FILE).is_file():
        run.summary = summary.read(path / _SUMMARY_FILE)
    _announce(path / PCS_FILE)
    run.pcs = PcFigures.read(path)
    if (path / HTML_DIRECTORY / "index.html").is_file():
        run.html = path / HTML_DIRECTORY / "index.html"
    elif (path / "htmlcov" / "index.html").is_file():
        run.html = path / "htmlcov" / "index.html"
    if (path / PERFETTO_FILE).is_file():
        run.perfetto = path / PERFETTO_FILE
    return run


def _announce(path: Path) -> None:
    """Say that a file is read, if that takes longer than a moment."""
    with contextlib.suppress(OSError):
        if (size := path.stat().st_size) > _PERCEPTIBLE_BYTES:
            _log.info("reading %s (%d MiB)", path, size >> 20)


def _read_calls(
    path: Path, run: RunDirectory, report: Report, number: int, begin: float
) -> list[tuple[int, Call]]:
    """Read the calls of a directory; of a trace that is damaged, those before the damage.

    A file may have traces of several tests, each with a clock of its own: they are put one after
    the other. Files of several workers are of the same time.

    Args:
        number: of the directory's first trace.
        begin: when the traces of the directory begin.
    """
    calls: list[tuple[int, Call]] = []
    for name in path.glob("trace*.jsonl"):
        _announce(name)
    for reader in read_traces(path):
        offset = end = begin
        last: Call | None = None
        try:
            for call in reader:
                if not math.isfinite(call.start) or not math.isfinite(call.seconds or 0.0):
                    raise InfrastructureError(f"a call of {path} has no time")
                if last is not None and (call.start < last.start or call.test != last.test):
                    offset = end
                last = call
                if offset:
                    call = dataclasses.replace(call, start=offset + call.start)
                end = max(end, _returned(call))
                calls.append((number + len(run.traces), call))
        except BridgeError as error:
            report.problems.append(f"the trace is incomplete: {error.message}")
        run.traces.append(reader.header)
    return calls


def _note_losses(report: Report, tests: list[RecordedTest]) -> None:
    summaries = [run.summary for run in report.runs if run.summary]
    for figures in summaries:
        for name, what in _LOSSES.items():
            if figures.get(name):
                report.losses.append(f"{figures[name]:,} {what}")
        if figures.get("problem"):
            report.losses.append(f"figures are old or missing: {figures['problem']}")
        if figures.get("error"):
            report.losses.append(f"the run ended early: {figures['error']}")
    traced = [test for test in tests if test.pcs is not None or test.lost is not None]
    for test in traced:
        if test.lost:
            report.losses.append(f"{test.lost:,} PCs or processes were lost in {test.test}")
    report.loss_known = bool(summaries or traced) and all(test.lost is not None for test in traced)


def _add_lines_of_tests(report: Report, host: HostData, by_path: dict[str, SourceFile]) -> None:
    """Fill ``lines_by_test`` and ``lines_over_tests``."""
    ids = {test.test for test in report.tests}
    for path, contexts in host.lines.items():
        for context, numbers in contexts.items():
            test = context.rpartition("|")[0]
            if test in ids:
                reached = report.lines_by_test.setdefault(test, {}).setdefault(path, set())
                reached |= by_path[path].count(numbers)
    seen: set[tuple[str, int]] = set()
    points: TSeries = []
    for number, record in enumerate(report.tests, 1):
        for path, reached in report.lines_by_test.get(record.test, {}).items():
            seen.update((path, line) for line in reached)
        points.append((number, len(seen)))
    if seen:
        report.lines_over_tests = points


def _add_figures_of_calls(report: Report, by_path: dict[str, SourceFile]) -> None:
    """Fill what is computed from the calls."""
    syscalls: dict[str, SyscallFigures] = {}
    lines: set[tuple[str, int]] = set()
    functions: set[str] = set()
    line_points: TSeries = []
    function_points: TSeries = []
    end = 0.0
    # Lines are there when a call has returned.
    for _, call in sorted(report.calls, key=lambda each: _returned(each[1])):
        figures = syscalls.setdefault(call.name, SyscallFigures(call.name))
        figures.calls += 1
        figures.seconds += call.seconds or 0.0
        figures.host_calls += bool(call.host)
        figures.kernel.update(call.kernel)
        if call.error:
            figures.errors[call.error] += 1
        before = len(lines)
        places: set[tuple[str, int]] = set()
        for code in call.host:
            path = report.paths[code.file]
            file = by_path.get(path)
            reached = file.count(code.lines) if file is not None else code.lines
            places.update((path, line) for line in reached)
        lines |= places
        figures.lines |= places
        report.hot_lines.update(places)
        end = _returned(call)
        if len(lines) > before:
            line_points.append((end, len(lines)))
        before = len(functions)
        functions.update(call.kernel)
        if len(functions) > before:
            function_points.append((end, len(functions)))
    report.syscalls = sorted(syscalls.values(), key=lambda each: (-each.calls, each.name))
    report.lines_over_time = thin_out(line_points, end)
    report.kernel_over_time = thin_out(function_points, end)


def _returned_of(traced: tuple[int, Call]) -> float:
    return _returned(traced[1])


def _returned(call: Call) -> float:
    return call.start + (call.seconds or 0.0)
