# SPDX-License-Identifier: Apache-2.0
"""What a test report says of the guest.

A failed assertion shows the frames of the test alone. A failure of the machine shows what the
bridge knows: its message, its evidence and what to do. To both the console's end and the kernel's
log since the test began are added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from bridge.errors import BridgeError
from bridge.pytest_plugin.guest import CommandError, WaitTimeoutError
from bridge.pytest_plugin.machines import Lease, SickMachineError

__all__ = ["complete"]

_LINES: Final = 40


def complete(report: pytest.TestReport, call: pytest.CallInfo[Any], lease: Lease | None) -> None:
    """Add to a report what is known of the test's guest."""
    error = call.excinfo.value if call.excinfo is not None else None
    if isinstance(error, BridgeError) and report.failed:
        report.longrepr = _of_the_machine(error, lease)
    elif isinstance(error, CommandError | WaitTimeoutError) and report.failed:
        report.longrepr = _of_the_test(report, call)
    if lease is not None and report.failed:
        if faults := lease.target_faults():
            report.sections.append(("exceptions of the target", "\n".join(faults)))
        _add_evidence(report, lease)


def _of_the_machine(error: BridgeError, lease: Lease | None) -> str:
    kind = "is not well" if isinstance(error, SickMachineError) else "failed"
    text = error.report()
    if lease is not None and error is lease.session.machine.loss:
        # Its evidence is the console's end, also of the tests before: a section has this test's.
        text = error.message + (f"\nhint: {error.hint}" if error.hint else "")
    return f"the machine {kind}, not an assertion of the test: {text}"


def _of_the_test(report: pytest.TestReport, call: pytest.CallInfo[Any]) -> Any:
    """Return the report without the frames of this package."""
    excinfo = call.excinfo
    if excinfo is None:
        return report.longrepr
    excinfo.traceback = excinfo.traceback.filter(
        lambda entry: "pytest_plugin" not in Path(entry.path).parts
    )
    return excinfo.getrepr(style="short", abspath=False)


def _add_evidence(report: pytest.TestReport, lease: Lease) -> None:
    console = lease.session.machine.console.since(lease.console_start).splitlines()
    if console:
        report.sections.append(("end of the guest's console", "\n".join(console[-_LINES:])))
    if lease.session.machine.loss is not None:
        return
    try:
        log = lease.kernel_log().splitlines()
    except BridgeError as error:
        report.sections.append(("guest kernel log", f"it cannot be read: {error.message}"))
        return
    if log:
        report.sections.append(("guest kernel log since the test began", "\n".join(log[-_LINES:])))
