# SPDX-License-Identifier: Apache-2.0
"""The HTML page of runs: its data, which ``report.js`` shows.

Lists that repeat are interned: a call names its arguments, its host code and its kernel functions
by their index.
"""

from __future__ import annotations

import importlib.resources
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from bridge.results.report.document import link, render_document
from bridge.results.report.gather import Report, RunDirectory, gather
from bridge.results.report.host import SourceFile
from bridge.results.test_record import (
    EVIDENCE_DIRECTORY,
    Outcome,
    RecordedTest,
    evidence_name,
)
from bridge.trace import HostThread
from bridge.util.files import write_atomically

__all__ = ["page_data", "render_page", "write_report"]

_CALLS: Final = 200_000
"""Calls that the page lists at most; figures are of all."""
_KERNEL_NAMES: Final = 2_000_000
"""Kernel functions of calls that the page lists at most, all calls together."""
_TEXT: Final = 400
"""Characters of the arguments of a call, and of other texts from the guest."""
_TEXTS: Final = 16 << 20
"""Characters of all arguments together; beyond that each call has a few."""
_FEW: Final = 40
_MESSAGE: Final = 20_000
"""Characters of the message of a test."""
_HOT: Final = 60
_SAFE_INTEGER: Final = 1 << 53

_T = TypeVar("_T", bound=Hashable)


def write_report(directory: Path, output: Path) -> None:
    """Write the page of a run's directory, or of a pytest run's.

    Raises:
        BridgeError: the directory has nothing to report, or a file cannot be read or written.
    """
    with gather([directory]) as (report, _):
        write_atomically(output, render_page(report, output.absolute().parent))


def render_page(report: Report, base: Path | None = None) -> str:
    """Return the page.

    Args:
        base: directory of the page, for links to files beside it; None makes no links.
    """
    program = importlib.resources.files(__package__).joinpath("report.js")
    return render_document(
        _title(report),
        page_data(report, base),
        program.read_text(encoding="utf-8"),
    )


class _Interned(Generic[_T]):
    """Numbers different values in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[_T, int] = {}

    def number(self, value: _T) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    @property
    def values(self) -> list[_T]:
        return list(self._numbers)


def page_data(report: Report, base: Path | None) -> dict[str, Any]:
    """Return what the page's program shows; JSON can hold it."""
    number_of = {file.path: number for number, file in enumerate(report.files)}
    return {
        "facts": _facts(report),
        "links": _links(report.runs, base),
        "losses": report.losses,
        "lossKnown": report.loss_known,
        "problems": _problems(report),
        "totals": _totals(report),
        "files": [_file(file) for file in report.files],
        "tests": [
            {**_test(test, report, number_of), "evidence": _evidence(test, report.runs, base)}
            for test in report.tests
        ],
        "series": _series(report),
        "hot": _hot(report, number_of),
        "syscalls": _syscalls(report),
        "kernel": _kernel(report),
        "trace": _trace(report, number_of),
    }


def _title(report: Report) -> str:
    if report.tests:
        outcomes = Counter(test.outcome for test in report.tests)
        failed = outcomes[Outcome.FAILED] + outcomes[Outcome.ERROR]
        tests = "test" if len(report.tests) == 1 else "tests"
        if failed:
            return f"{failed:,} of {len(report.tests):,} {tests} failed"
        skipped = f", {outcomes[Outcome.SKIPPED]:,} skipped" if outcomes[Outcome.SKIPPED] else ""
        return f"{outcomes[Outcome.PASSED]:,} {tests} passed{skipped}"
    for run in report.runs:
        if command := run.summary.get("command"):
            return _cut(" ".join(map(str, command)), 100)
    return report.runs[0].path.name if report.runs else "Report"


def _facts(report: Report) -> list[list[str]]:
    """Return what ran where, as rows of name and text; several values are joined."""
    rows: dict[str, list[str]] = {}

    def add(name: str, value: object) -> None:
        text = _cut("" if value is None else str(value))
        if text and text not in rows.setdefault(name, []):
            rows[name].append(text)

    for run in report.runs:
        figures = run.summary
        add("Directory", run.path)
        add("Command", " ".join(map(str, figures.get("command") or ())))
        if "exit_status" in figures:
            add("Exit status", figures["exit_status"])
        add("Target", figures.get("target"))
        add("Kernel", figures.get("kernel"))
        reason = figures.get("accel_reason")
        add("Accelerator", f"{figures.get('accel', '')}" + (f" ({reason})" if reason else ""))
        add("Sources", ", ".join(map(str, figures.get("sources") or ())))
        if figures.get("boot_seconds") is not None:
            how = "from a snapshot" if figures.get("from_snapshot") else "booted"
            add("Ready after", f"{figures['boot_seconds']:.2f} s, {how}")
        for trace in run.traces:
            add("Image", trace.image)
            add("Kernel", trace.kernel)
            add("Sources", trace.source.replace(",", ", "))
    for test in report.tests:
        add("Image", test.image)
        add("Kernel", test.kernel)
        add("Accelerator", test.accelerator)
        add("Workers", test.worker)
    return [[name, ", ".join(texts)] for name, texts in rows.items() if texts]


def _links(runs: list[RunDirectory], base: Path | None) -> list[dict[str, str]]:
    if base is None:
        return []
    files = [
        (text, run.path, path)
        for run in runs
        for text, path in (
            ("coverage.py's own pages", run.html),
            ("trace for Perfetto", run.perfetto),
        )
        if path is not None
    ]
    return [
        {
            "text": f"{text} ({directory.name})" if len(runs) > 1 else text,
            "href": link(path, base),
        }
        for text, directory, path in files
    ]


def _problems(report: Report) -> list[str]:
    problems = list(report.problems)
    if len(report.calls) > _CALLS:
        problems.append(
            f"the trace has {len(report.calls):,} calls; the first {_CALLS:,} are listed here, "
            "trace.jsonl has all"
        )
    return problems


def _totals(report: Report) -> dict[str, Any]:
    outcomes = Counter(test.outcome.value for test in report.tests)
    summaries = [run.summary for run in report.runs if run.summary]
    test_pcs = [test.pcs for test in report.tests if test.pcs is not None]
    pcs = [int(figures.get("pcs") or 0) for figures in summaries]
    seconds = [figures["run_seconds"] for figures in summaries if figures.get("run_seconds")]
    if report.tests:
        first = min(test.began for test in report.tests)
        seconds = [max(test.began + test.seconds for test in report.tests) - first]
    blocks = [figures.get("kernel_blocks_covered") for figures in summaries]
    kernel_blocks = [count for count in blocks if count is not None]
    calls = sum(int(figures.get("returns") or 0) for figures in summaries)
    return {
        "tests": len(report.tests),
        "outcomes": dict(outcomes),
        "machine": sum(
            test.kind_of_failure is not None and test.kind_of_failure.value == "machine"
            for test in report.tests
        ),
        "seconds": sum(seconds) if seconds else None,
        "resetSeconds": sum(test.reset_seconds for test in report.tests),
        "reached": sum(len(file.reached) for file in report.files),
        "statements": sum(len(file.statements) for file in report.files),
        "calls": len(report.calls) or calls or sum(test.calls or 0 for test in report.tests),
        "pcs": sum(pcs) if pcs else sum(test_pcs) if test_pcs else None,
        "pcsDifferent": sum(int(figures.get("pcs_unique") or 0) for figures in summaries),
        "nativeCovered": sum(each.count(1) for each in report.native_covered.values()),
        "nativeBlocks": sum(map(len, report.native_covered.values())),
        "kernelBlocks": sum(kernel_blocks) if kernel_blocks else None,
    }


def _file(file: SourceFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "path": file.path,
        "text": file.text,
        "statements": _ranges(file.statements),
        "reached": _ranges(file.reached),
        "more": [[line, first] for line, first in sorted(file.first_lines.items())],
        "functions": [[each.name, each.first, each.last] for each in file.functions],
        "problem": file.problem,
    }


def _test(test: RecordedTest, report: Report, number_of: dict[str, int]) -> dict[str, Any]:
    lines = report.lines_by_test.get(test.test, {})
    return {
        "id": test.test,
        "outcome": test.outcome.value,
        "kind": test.kind_of_failure.value if test.kind_of_failure else "",
        "seconds": test.seconds,
        "reset": test.reset_seconds,
        "began": test.began,
        "machine": " · ".join(
            filter(None, (test.image, test.kernel, test.accelerator, test.worker))
        ),
        "lines": [[number_of[path], _ranges(reached)] for path, reached in sorted(lines.items())],
        "calls": test.calls,
        "pcs": test.pcs,
        "lost": test.lost,
        "message": _cut(test.message, _MESSAGE),
    }


def _evidence(test: RecordedTest, runs: list[RunDirectory], base: Path | None) -> str:
    """Return the link to what is known of a failed test; "" if there is none."""
    if test.outcome not in (Outcome.FAILED, Outcome.ERROR) or base is None:
        return ""
    for run in runs:
        path = run.path / EVIDENCE_DIRECTORY / f"{evidence_name(test.test)}.txt"
        if path.is_file():
            return link(path, base)
    return ""


def _series(report: Report) -> list[dict[str, Any]]:
    found = [
        ("Host lines over time", "seconds", "lines", report.lines_over_time),
        ("Host lines over tests", "tests", "lines", report.lines_over_tests),
        ("Kernel functions over time", "seconds", "functions", report.kernel_over_time),
    ]
    for run in report.runs:
        if report.calls:
            # The trace shows the same over time.
            break
        of = f" ({run.path.name})" if len(report.runs) > 1 else ""
        found += [
            (f"Host blocks over PCs{of}", "PCs", "blocks", run.pcs.host_blocks),
            (f"Kernel blocks over PCs{of}", "PCs", "blocks", run.pcs.kernel_blocks),
        ]
    return [
        {"title": title, "x": x, "y": y, "points": [[round(at, 6), count] for at, count in points]}
        for title, x, y, points in found
        if points
    ]


def _hot(report: Report, number_of: dict[str, int]) -> dict[str, Any]:
    """Return what ran most: blocks of the PCs, or lines of the trace where there are none."""
    by_name = {file.name: number for number, file in enumerate(report.files)} | number_of
    host = sorted(
        (block for run in report.runs for block in run.pcs.hot_host), key=lambda each: -each.count
    )
    kernel = sorted(
        (block for run in report.runs for block in run.pcs.hot_kernel),
        key=lambda each: -each.count,
    )
    rows = [
        [by_name.get(each.place, -1), each.line, each.place, each.detail, each.count]
        for each in host[:_HOT]
    ]
    unit = "PCs"
    if not rows and report.hot_lines:
        unit = "calls"
        most = sorted(report.hot_lines.items(), key=lambda item: (-item[1], item[0]))
        for (path, line), count in most[:_HOT]:
            number = number_of.get(path, -1)
            name = report.files[number].name if number >= 0 else path
            rows.append([number, line, name, str(line), count])
    return {
        "unit": unit,
        "host": rows,
        "kernel": [[each.place, each.detail, each.count] for each in kernel[:_HOT]],
    }


def _syscalls(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "name": _cut(each.name),
            "calls": each.calls,
            "errors": each.errors.most_common(6),
            "failed": sum(each.errors.values()),
            "seconds": round(each.seconds, 6),
            "hostCalls": each.host_calls,
            "lines": len(each.lines),
            "kernel": len(each.kernel),
        }
        for each in report.syscalls
    ]


def _kernel(report: Report) -> list[list[Any]]:
    """Return rows of function, module, blocks and PCs; those of several runs together."""
    rows: dict[tuple[str, str], list[int]] = {}
    for run in report.runs:
        for function in run.pcs.functions:
            row = rows.setdefault((function.name, function.module), [0, 0])
            # The same blocks in each run, more or less: the most is nearest to the truth.
            row[0] = max(row[0], function.blocks)
            row[1] += function.pcs
    known = {name for name, _ in rows}
    for _, call in report.calls:
        for name in call.kernel:
            if name not in known:
                rows.setdefault((name, ""), [0, 0])
    return [[*key, *row] for key, row in rows.items()]


def _trace(report: Report, number_of: dict[str, int]) -> dict[str, Any]:
    """Return the calls as columns, and the tables that they refer to."""
    names: _Interned[str] = _Interned()
    threads: _Interned[tuple[int, int]] = _Interned()
    thread_names: dict[tuple[int, int], str] = {}
    texts: _Interned[str] = _Interned()
    codes: _Interned[tuple[int, str, str, int]] = _Interned()
    host_threads: _Interned[tuple[int, HostThread]] = _Interned()
    host_sets: _Interned[tuple[int, ...]] = _Interned()
    functions: _Interned[str] = _Interned()
    kernel_sets: _Interned[tuple[int, ...]] = _Interned()
    tests = {test.test: number for number, test in enumerate(report.tests)}
    columns: dict[str, list[Any]] = {
        key: []
        for key in (
            *("start", "seconds", "thread", "name", "arguments"),
            *("result", "error", "host", "kernel", "test"),
        )
    }
    spent = spoken = 0
    listed = set()
    for trace, call in itertools.islice(report.calls, _CALLS):
        key = trace, call.thread
        thread_names[key] = _cut(call.command, 40) or thread_names.get(key, "")
        host = tuple(
            codes.number(
                (
                    number_of.get(report.paths[code.file], -1),
                    code.function,
                    _words(code.lines),
                    host_threads.number((trace, code.thread)) if code.thread is not None else -1,
                )
            )
            for code in call.host
        )
        kernel: tuple[int, ...] = ()
        if call.kernel:
            kernel = tuple(functions.number(_cut(name)) for name in call.kernel)
            if kernel not in listed and spent + len(kernel) <= _KERNEL_NAMES:
                listed.add(kernel)
                spent += len(kernel)
        arguments = -1
        if call.arguments is not None:
            text = _cut(", ".join(call.arguments), _TEXT if spoken < _TEXTS else _FEW)
            arguments = texts.number(text)
            spoken += len(text)
        row = {
            "start": round(call.start, 6),
            "seconds": round(call.seconds, 7) if call.seconds is not None else -1,
            "thread": threads.number(key),
            "name": names.number(_cut(call.name, 60)),
            "arguments": arguments,
            "result": _result(call.result),
            "error": texts.number(_cut(call.error, 60)) if call.error else -1,
            "host": host_sets.number(host) if host else -1,
            # -2: left out, for want of room.
            "kernel": -1 if not kernel else kernel_sets.number(kernel) if kernel in listed else -2,
            "test": tests.get(call.test, -1) if call.test else -1,
        }
        for name, value in row.items():
            columns[name].append(value)
    several = len({trace for trace, _ in threads.values}) > 1
    return {
        **columns,
        "total": len(report.calls),
        "names": names.values,
        "threads": [
            [f"{trace + 1}:{thread}" if several else str(thread), thread_names[trace, thread]]
            for trace, thread in threads.values
        ],
        "texts": texts.values,
        "codes": codes.values,
        "hostThreads": _host_threads(host_threads.values),
        "hostSets": host_sets.values,
        "functions": functions.values,
        "kernelSets": kernel_sets.values,
    }


def _host_threads(threads: Sequence[tuple[int, HostThread]]) -> list[str]:
    """Return what threads of the target are called: their ids only where a name is not enough."""
    names = Counter((trace, thread.name) for trace, thread in threads)
    return [
        _cut(thread.name, 60)
        if thread.name and names[trace, thread.name] == 1
        else f"{_cut(thread.name, 60) or 'thread'} {thread.id}"
        for trace, thread in threads
    ]


def _result(value: int | None) -> int | str | None:
    """Return a result as the page shows it: addresses in hex."""
    if value is None or abs(value) < 1 << 32:
        return value
    return hex(value)


def _ranges(lines: Iterable[int]) -> list[int]:
    """Encode lines: first and last of each run of consecutive ones, one after the other."""
    ranges: list[int] = []
    for line in sorted(lines):
        if ranges and line == ranges[-1] + 1:
            ranges[-1] = line
        elif line < _SAFE_INTEGER:
            ranges += [line, line]
    return ranges


def _words(lines: Iterable[int]) -> str:
    """Return lines as people write them: ``1-3, 7``."""
    ranges = _ranges(lines)
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in pairs)


def _cut(text: str, limit: int = _TEXT) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
