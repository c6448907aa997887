# SPDX-License-Identifier: Apache-2.0
"""What is known of a guest and its target when a test fails, gathered before anything is killed.

The report of the test shows the end of each part. With ``--guest-report`` the whole is in the
directory ``evidence`` there, in a file for each test, with the core dumps beside it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from bridge.errors import BridgeError, InfrastructureError
from bridge.results.test_record import evidence_name
from bridge.session.evidence import guest_processes
from bridge.util.files import write_atomically

if TYPE_CHECKING:
    from bridge.pytest_plugin.machines import Lease

__all__ = ["Section", "add_to_report", "before_kill", "gather", "set_timer"]

Section = tuple[str, str]
"""A title and a text."""

_LINES: Final = 40
"""How many lines of each part a report shows."""
_LOOK_SECONDS: Final = 10.0
_CORE_LIMIT: Final = 4 << 20


def gather(lease: Lease) -> list[Section]:
    """Return what is known now: of the guest, as far as it answers, and of the target."""
    sections = list(lease.hang)
    session = lease.session
    sections.append(
        ("end of the guest's console", session.machine.console.since(lease.console_start))
    )
    calls = [line for traced in lease.traces for line in traced.last_calls()]
    sections.append(("last traced system calls", "\n".join(calls)))
    if session.machine.loss is None:
        try:
            sections.append(("guest kernel log since the test began", lease.kernel_log()))
        except BridgeError as error:
            sections.append(("guest kernel log", f"it cannot be read: {error.message}"))
    return [(title, text) for title, text in sections if text.strip()]


def before_kill(lease: Lease) -> None:
    """Keep where the guest's processes and the target's threads are: a command is to be killed."""
    if lease.hang or isinstance(sys.exc_info()[1], KeyboardInterrupt):
        return
    session = lease.session
    if session.machine.loss is None:
        with contextlib.suppress(BridgeError):
            text = guest_processes(session, _LOOK_SECONDS)
            lease.hang.append(("processes of the guest before the time-out", text))
    if stacks := session.target_stacks():
        lease.hang.append(("threads of the target before the time-out", stacks))


def add_to_report(report: pytest.TestReport, lease: Lease) -> None:
    """Add to the report of a failed test what is known; keep all of it in the directory."""
    sections = gather(lease)
    for title, text in sections:
        report.sections.append((title, "\n".join(text.splitlines()[-_LINES:])))
    try:
        path = _save(lease, [("failure", report.longreprtext), *report.sections, *sections])
    except (OSError, BridgeError) as error:
        report.sections.append(("evidence", f"it cannot be kept: {error}"))
    else:
        if path is not None:
            report.sections.append(("evidence", str(path)))


def _save(lease: Lease, sections: Sequence[Section]) -> Path | None:
    """Write a file with all of it; raises OSError, InfrastructureError."""
    if lease.directory is None:
        return None
    name = evidence_name(lease.nodeid)
    path = lease.directory / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A whole text takes the place of its end.
    whole = dict(sections)
    text = "".join(f"==== {title}\n{text.rstrip()}\n\n" for title, text in whole.items())
    write_atomically(path, text.encode(errors="replace"))
    for core in lease.new_cores() if lease.session.machine.loss is None else ():
        target = lease.directory / f"{name}.core.{core.pid}"
        with contextlib.suppress(BridgeError):
            size = lease.session.run(["stat", "-c", "%s", core.path], timeout=_LOOK_SECONDS)
            if int(size.stdout or b"0") <= _CORE_LIMIT:
                lease.session.get(core.path, target)
    return path


# ---- pytest-timeout


def set_timer(item: pytest.Item, settings: Any, lease_of: Any) -> None:
    """Do what pytest-timeout does for its method ``thread``, which ends the process.

    What is known is kept and printed first.
    """
    import pytest_timeout  # type: ignore[import-untyped]

    def timed_out() -> None:
        # Whatever happens here, the time-out must come.
        with contextlib.suppress(BaseException):
            if (lease := lease_of(item)) is not None:
                before_kill(lease)
                _print(item, lease)
        pytest_timeout.timeout_timer(item, settings)

    timer = threading.Timer(settings.timeout, timed_out)
    timer.name = f"{__name__} {item.nodeid}"

    def cancel() -> None:
        timer.cancel()
        timer.join()

    setattr(item, "cancel_timeout", cancel)  # noqa: B010
    timer.start()


def _print(item: pytest.Item, lease: Lease) -> None:
    sections = gather(lease)
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    for title, text in sections:
        print(f"\n---- {title}\n" + "\n".join(text.splitlines()[-_LINES:]), file=sys.stderr)
    with contextlib.suppress(OSError, InfrastructureError):
        if (path := _save(lease, [("failure", "pytest-timeout"), *sections])) is not None:
            print(f"\n---- evidence\n{path}", file=sys.stderr)
    sys.stderr.flush()
