# SPDX-License-Identifier: Apache-2.0
"""What a test report says of the guest.

A failed assertion shows the frames of the test alone. A failure of the machine shows what the
bridge knows: its message, its evidence and what to do. To both the console's end and the kernel's
log since the test began are added.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import _pytest
import pluggy
import pytest
from _pytest._code.code import Traceback

import bridge
from bridge.errors import BridgeError, RunTimeoutError, TargetError, UsageError
from bridge.pytest_plugin.evidence import add_to_report
from bridge.pytest_plugin.guest import CommandError, WaitTimeoutError
from bridge.pytest_plugin.machines import Lease, SickMachineError
from bridge.results.test_record import FailureKind
from bridge.sources.python.functions import ranges_text
from bridge.trace.text import render_trace

__all__ = ["add_extras", "complete"]

_CALLS: Final = 1000
"""How many traced calls of a test a page shows."""
_OF_THE_TEST: Final = (CommandError, WaitTimeoutError, UsageError, RunTimeoutError)
"""What a test's own commands and arguments lead to."""
_NOT_THE_TEST: Final = tuple(
    Path(module.__file__ or "").parent for module in (bridge, _pytest, pluggy, os)
)


def complete(
    report: pytest.TestReport, call: pytest.CallInfo[Any], lease: Lease | None
) -> FailureKind | None:
    """Add to a report what is known of the test's guest; return what made the test fail."""
    kind = FailureKind.ASSERTION if report.failed else None
    error = call.excinfo.value if call.excinfo is not None else None
    if call.excinfo is not None and report.failed:
        if isinstance(error, _OF_THE_TEST) and (report.when != "setup" or lease is not None):
            report.longrepr = _of_the_test(call.excinfo)
        elif isinstance(error, BridgeError):
            if not isinstance(error, UsageError):
                kind = FailureKind.MACHINE
            report.longrepr = _of_the_machine(error, call.excinfo, lease)
    if lease is not None and report.failed:
        if faults := lease.target_faults():
            report.sections.append(("exceptions of the target", "\n".join(faults)))
        add_to_report(report, lease)
    return kind


def _of_the_machine(
    error: BridgeError, excinfo: pytest.ExceptionInfo[BaseException], lease: Lease | None
) -> str:
    if isinstance(error, UsageError):
        kind = "what the test asks for cannot be had"
    elif isinstance(error, TargetError):
        kind = "the target failed, not an assertion of the test"
    elif isinstance(error, SickMachineError):
        kind = "the machine is not well, not an assertion of the test"
    else:
        kind = "the machine failed, not an assertion of the test"
    text = error.report()
    loss = lease.session.machine.loss if lease is not None else None
    # What a command raises then is a copy.
    if loss is not None and (type(error), error.message) == (type(loss), loss.message):
        # Its evidence is the console's end, also of the tests before: a section has this test's.
        text = error.message + (f"\nhint: {error.hint}" if error.hint else "")
    for entry in reversed(_frames(excinfo)):
        text += (
            f"\nat {os.path.relpath(entry.path)}:{entry.lineno + 1}: {str(entry.statement).strip()}"
        )
        break
    return f"{kind}: {text}"


def _of_the_test(excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
    """Return what pytest shows, without the frames of this package."""
    excinfo.traceback = _frames(excinfo) or excinfo.traceback
    error = excinfo.value
    # What the bridge ran into to raise this is of no use to the test.
    of_the_bridge = isinstance(error, BridgeError)
    shown = excinfo.getrepr(style="short", abspath=False, chain=not of_the_bridge)
    if isinstance(error, BridgeError) and (error.evidence or error.hint):
        shown.addsection("more about this error", error.report())
    return shown


def _frames(excinfo: pytest.ExceptionInfo[BaseException]) -> Traceback:
    """Return the frames of the test, without those of the bridge, pytest and Python's library."""
    return excinfo.traceback.filter(
        lambda entry: not any(Path(entry.path).is_relative_to(path) for path in _NOT_THE_TEST)
    )


def add_extras(
    report: pytest.TestReport,
    config: pytest.Config,
    lease: Lease,
    lines: Mapping[str, Iterable[int]],
    page: Path | None,
) -> None:
    """Add to a report what pytest-html shows beside a test; nothing without pytest-html.

    Args:
        report: of the test's teardown.
        lines: the lines that the test reached, by file.
        page: the report of all guest tests, or None.
    """
    html = config.getoption("htmlpath", None)
    if not html:
        return
    from pytest_html import extras

    texts = {"guest": "\n".join(f"{name}: {value}" for name, value in report.user_properties)}
    texts["lines"] = "\n".join(
        f"{os.path.relpath(file)}: {ranges_text(sorted(numbers))}"
        for file, numbers in sorted(lines.items())
    )
    calls = (call for traced in lease.traces for call in traced.calls)
    texts["calls"] = "\n".join(render_trace(itertools.islice(calls, _CALLS)))
    texts["console"] = lease.session.machine.console.since(lease.console_start)
    added = [extras.text(text, name) for name, text in texts.items() if text]
    if page is not None:
        at = os.path.relpath(page, Path(config.invocation_params.dir, html).absolute().parent)
        added.append(extras.url(at, "all guest tests"))
    # Not an attribute of pytest's own class.
    report.__dict__["extras"] = [*getattr(report, "extras", []), *added]
