# SPDX-License-Identifier: Apache-2.0
"""What the monitor of a slot notices of real guests and targets, and what it collects."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from bridge.config import Settings
from bridge.errors import BridgeError, GuestPanicError, RunTimeoutError
from bridge.fuzz.monitor import MachineMonitor, resident
from bridge.fuzz.slot_events import Evidence, Suspect
from bridge.fuzz.titles import Fault, Kind, faults_of
from bridge.session.session import Session
from bridge.session.target_host import TargetState
from tests.fuzz.planted_target import PlantedTarget, tell
from tests.support.kernel_faults import load_faults, provoke

pytestmark = pytest.mark.vm

LIMIT = 400
"""MiB that the target may take; it takes less than 100 when it is well."""

PACKAGES = ("tests.fuzz.planted",)


@pytest.fixture(scope="module")
def started() -> Iterator[Session]:
    settings = Settings(source="python", diagnose=True)
    session = Session(settings, target=PlantedTarget, target_state=TargetState.FORK)
    with session:
        yield session


@pytest.fixture
def session(started: Session) -> Session:
    started.reset()
    return started


@pytest.fixture
def monitor(session: Session) -> Iterator[MachineMonitor]:
    with MachineMonitor(memory=LIMIT) as monitor:
        monitor.began(session)
        assert not monitor.trouble()
        yield monitor


def noticed(monitor: MachineMonitor, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not monitor.trouble():
        assert time.monotonic() < end, "the monitor noticed nothing"
        time.sleep(0.01)


def judged(evidence: Evidence, *, timed_out: bool = False) -> Fault:
    status = None if timed_out else 0
    faults = faults_of(Suspect(b"", status, timed_out=timed_out, evidence=evidence), PACKAGES)
    assert faults, evidence
    return faults[0]


def test_monitor_well_machine_has_no_trouble(session: Session, monitor: MachineMonitor) -> None:
    session.run(tell("hello", "again"), timeout=60)
    assert not monitor.trouble()
    evidence = monitor.collect(timed_out=False)
    assert (evidence.lost, evidence.problems, evidence.stacks) == ("", (), "")
    assert faults_of(Suspect(b"", 0, evidence=evidence), PACKAGES) == []
    assert session.target_pid is not None
    assert 0 < resident(session.target_pid) < LIMIT << 20


def test_monitor_exception_of_the_target_is_noticed_when_it_happens(
    session: Session, monitor: MachineMonitor
) -> None:
    memory = session.target_fault_memory
    assert memory is not None
    before = os.pread(memory, 8, 0)
    session.run(tell("raise"), timeout=60)
    # Before anybody asks the target. The shim looks at that word after each case.
    assert int.from_bytes(os.pread(memory, 8, 0), "little") == session.target_fault_count
    assert os.pread(memory, 8, 0) != before
    assert monitor.trouble()
    fault = judged(monitor.collect(timed_out=False))
    assert fault.kind is Kind.TARGET_EXCEPTION
    assert fault.title == "AssertionError in check_header (fuzz/planted.py)"
    assert fault.stack[:3] == (
        "check_header (fuzz/planted.py)",
        "answer (fuzz/planted.py)",
        "handle (fuzz/planted.py)",
    )
    # Another one after a reset is another one.
    session.reset()
    monitor.began(session)
    assert not monitor.trouble()
    session.run(tell("raise"), timeout=60)
    assert monitor.trouble()


def test_monitor_death_of_the_target_has_how_and_where(
    session: Session, monitor: MachineMonitor
) -> None:
    session.run(tell("die"), timeout=60)
    noticed(monitor)
    fault = judged(monitor.collect(timed_out=False))
    assert fault.kind is Kind.TARGET_DEATH
    assert fault.title == (
        "the process of the target planted was killed by SIGSEGV in answer (fuzz/planted.py)"
    )
    session.reset()
    monitor.began(session)
    assert not monitor.trouble()
    session.run(tell("exit"), timeout=60)
    noticed(monitor)
    fault = judged(monitor.collect(timed_out=False))
    assert fault.title == "the process of the target planted exited with N"


def test_monitor_target_that_hangs_is_to_blame(session: Session, monitor: MachineMonitor) -> None:
    with pytest.raises(RunTimeoutError):
        session.run(tell("hang"), timeout=2)
    assert not monitor.trouble()
    fault = judged(monitor.collect(timed_out=True), timed_out=True)
    assert fault.kind is Kind.TARGET_HANG
    assert fault.title == "the target hangs in loop_forever (fuzz/planted.py)"


def test_monitor_target_without_bounds_is_ended(session: Session, monitor: MachineMonitor) -> None:
    pid = session.target_pid
    assert pid is not None
    *bash, script = tell("eat")
    session.guest.run([*bash, f"{{ {script}; }} >/dev/null 2>&1 &"], timeout=60)
    noticed(monitor)
    fault = judged(monitor.collect(timed_out=False))
    assert fault.kind is Kind.TARGET_MEMORY
    assert fault.title == f"the target takes more memory than {LIMIT} MiB"
    assert "in take_memory" in fault.text
    assert resident(pid) == 0


def test_monitor_report_of_the_kernel_is_collected_whole(
    session: Session, monitor: MachineMonitor
) -> None:
    load_faults(session)
    titles = []
    for _ in range(2):
        session.run(provoke("warn"))
        noticed(monitor)
        evidence = monitor.collect(timed_out=False)
        for text in (evidence.console, evidence.dmesg):
            assert "---[ end trace" in text
        titles.append(judged(evidence).title)
        # The guest goes on: the second report is of another process.
        monitor.began(session)
        assert not monitor.trouble()
    assert titles[0].startswith("WARNING at ")
    assert titles[0] == titles[1]


def test_monitor_hung_task_and_where_the_guest_waits(
    session: Session, monitor: MachineMonitor
) -> None:
    load_faults(session)
    session.run("sysctl -qw kernel.hung_task_timeout_secs=1")
    with pytest.raises(RunTimeoutError):
        session.run(provoke("hang"), timeout=2)
    noticed(monitor)
    evidence = monitor.collect(timed_out=True)
    assert "fault_hang+0x" in evidence.stacks
    fault = judged(evidence, timed_out=True)
    assert fault.title == (
        "INFO: task sh:N blocked for more than N seconds in fault_hang [kernel_faults]"
    )


def test_monitor_panic_ends_the_guest_and_is_the_cause(started: Session) -> None:
    # The last one: nothing brings this guest back.
    started.reset()
    with MachineMonitor() as monitor:
        monitor.began(started)
        load_faults(started)
        with pytest.raises(BridgeError):
            started.run(provoke("panic"), timeout=60)
        noticed(monitor)
        evidence = monitor.collect(timed_out=False)
        assert "the guest kernel panicked" in evidence.lost
        fault = judged(evidence)
        assert fault.kind is Kind.KERNEL
        assert fault.title.startswith("Kernel panic - not syncing: kernel_faults: all is lost")
        with pytest.raises(GuestPanicError):
            started.reset()
