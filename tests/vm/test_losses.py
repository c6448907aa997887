# SPDX-License-Identifier: Apache-2.0
"""Guests that stop running while QEMU lives: they are lost at once, and a reset can rescue them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.errors import BootTimeoutError, GuestPanicError, GuestStoppedError
from bridge.vm.accel import Accelerator
from bridge.vm.agent import Ready
from bridge.vm.config import MachineConfig, MemoryFds
from bridge.vm.events import loss_by_status
from bridge.vm.machine import Ending, Machine, State
from bridge.vm.snapshot import Snapshot, new_memory
from tests.vm.support import READY, SUSPEND, SUSPEND_TO_DISK, TCG, boot_sector, eventually, lost

MEMORY = 64 << 20


@pytest.mark.parametrize(
    ("action", "words"),
    [(SUSPEND, "suspended itself to memory"), (SUSPEND_TO_DISK, "suspended itself to disk")],
)
@pytest.mark.parametrize("report", [b"", READY])
def test_guest_suspends_itself_is_lost_at_once(
    booted: Callable[..., Machine], report: bytes, action: bytes, words: str
) -> None:
    machine = booted(console=b"good night\r\n", report=report, action=action)
    reason = lost(machine)
    assert isinstance(reason, GuestStoppedError)
    assert words in reason.message
    assert reason.evidence.endswith("good night")
    with pytest.raises(GuestStoppedError, match=words):
        machine.check()
    assert machine.powerdown() in (Ending.QUIT, Ending.GONE)


def test_guest_crash_kernel_takes_over_is_a_panic(booted: Callable[..., Machine]) -> None:
    # mov dx, 0x505; mov al, 2; out dx, al
    machine = booted("-device", "pvpanic", report=READY, action=bytes.fromhex("ba0505 b002 ee"))
    reason = lost(machine)
    assert isinstance(reason, GuestPanicError)
    assert "its crash kernel runs next" in reason.message


@pytest.mark.parametrize("action", ["reset", "pause", "poweroff"])
def test_guest_watchdog_expires_is_lost_at_once(
    booted: Callable[..., Machine], action: str
) -> None:
    # mov dx, 0x443; mov al, 15; out dx, al: the ib700's shortest time, 0 s
    expire = bytes.fromhex("ba4304 b00f ee")
    machine = booted(
        *("-device", "ib700", "-action", f"watchdog={action}"), report=READY, action=expire
    )
    reason = lost(machine)
    assert isinstance(reason, GuestStoppedError)
    assert f"did not answer to its watchdog in time (action: {action})" in reason.message


def test_guest_watchdog_that_does_nothing_loses_nothing(booted: Callable[..., Machine]) -> None:
    machine = booted(
        *("-device", "ib700", "-action", "watchdog=none"),
        action=bytes.fromhex("ba4304 b00f ee"),
        report=READY,
    )
    machine.wait_ready()
    eventually(lambda: any(event["event"] == "WATCHDOG" for event in machine.events))
    machine.execute("query-status")
    machine.check()


def test_disk_of_the_guest_fails_is_lost_with_the_reason(
    booted: Callable[..., Machine], tmp_path: Path
) -> None:
    disk = tmp_path / "bad.img"
    disk.write_bytes(bytes(1 << 20))
    # mov ax, 0x0301; mov cx, 1; mov dx, 0x81; xor bx, bx; mov es, bx; int 0x13: the second disk
    write = bytes.fromhex("b80103 b90100 ba8100 31db 8ec3 cd13")
    inject = "file.inject-error.0.event=pwritev,file.inject-error.0.errno=28"
    drive = f"if=none,id=bad,werror=stop,format=raw,file.driver=blkdebug,{inject}"
    machine = booted(
        *("-drive", f"{drive},file.image.driver=file,file.image.filename={disk}"),
        *("-device", "virtio-blk-pci,drive=bad"),
        report=READY,
        action=write,
    )
    reason = lost(machine)
    assert isinstance(reason, GuestStoppedError)
    assert "failed to read or write one of its disks" in reason.message
    assert "No space left on device" in reason.evidence
    assert "room" in reason.hint


def test_guest_memory_fails_is_lost_at_once(booted: Callable[..., Machine]) -> None:
    """A machine check that cannot be corrected, in a guest that takes none: it is reset."""
    machine = booted(report=READY)
    machine.wait_ready()
    machine._monitor("mce 0 1 0xb200000000000000 0 0 0")
    reason = lost(machine)
    assert isinstance(reason, GuestStoppedError)
    assert "fault in the host's memory: the guest was reset" in reason.message


def test_stop_that_nobody_asked_for_is_a_loss(machine: Machine) -> None:
    machine.adopt_ready(Ready("", "", 0, 0))
    machine._qmp.execute("stop")  # behind the machine's back
    reason = lost(machine)
    assert isinstance(reason, GuestStoppedError)
    assert "without a request of the bridge" in reason.message


def test_stop_that_was_asked_for_is_no_loss(machine: Machine) -> None:
    machine.adopt_ready(Ready("", "", 0, 0))
    for _ in range(3):
        machine.execute("stop")
        machine.execute("cont")
    names = [event["event"] for event in machine.events]
    assert names.count("STOP") == names.count("RESUME") == 3
    time.sleep(0.2)
    machine.check()


class Saved:
    """A machine that starts from what another one has saved, and goes back to it."""

    def __init__(self, stack: ExitStack, directory: Path, config: MachineConfig) -> None:
        with ExitStack() as first:
            ram = new_memory(MEMORY)
            first.callback(os.close, ram)
            machine = first.enter_context(Machine(config, memory=MemoryFds(ram)))
            machine.start()
            machine.wait_ready()
            Snapshot.save(directory, machine, ram)
        self.snapshot = stack.enter_context(Snapshot(directory))
        self.ram, states = new_memory(MEMORY), self.snapshot.states()
        stack.callback(os.close, self.ram)
        stack.callback(os.close, states)
        self.snapshot.restore(self.ram)
        fds = MemoryFds(self.ram, states, self.snapshot.devices)
        self.machine = stack.enter_context(Machine(config, memory=fds))
        self.machine.start()
        self.machine.adopt_ready(Ready("", "", 0, 0))
        self.machine.execute("cont")

    def rewind(self) -> None:
        """To the guest that was saved, which reports nothing, so it is called ready here."""
        with pytest.raises(BootTimeoutError):
            self.machine.rewind(lambda: self.snapshot.restore(self.ram), timeout=0.1)
        assert self.machine.state is State.BOOTING
        self.machine.adopt_ready(Ready("", "", 0, 0))

    def status(self) -> str:
        answer = self.machine.execute("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])


def asleep(tmp_path: Path, accelerator: Accelerator = TCG, action: bytes = b"") -> MachineConfig:
    """A guest that has said that it is ready and sleeps."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(boot_sector(report=READY, action=action))
    return MachineConfig(accelerator, memory_mib=64, disk=disk, boot_timeout=120)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_rewind_suspended_guest_runs_again(stack: ExitStack, tmp_path: Path) -> None:
    saved = Saved(stack, tmp_path / "saved", asleep(tmp_path))
    machine = saved.machine
    told: list[str] = []
    machine.add_loss_listener(lambda error: told.append(error.message))
    for number in range(1, 4):
        os.pwrite(saved.ram, b"what is new", 48 << 20)
        machine._monitor("o /h 0x604 0x2400")  # as the guest would do it
        eventually(lambda count=number: len(told) == count)  # type: ignore[misc]
        assert machine.state is State.LOST
        with pytest.raises(GuestStoppedError, match="suspended itself to memory"):
            machine.execute("query-status")
        saved.rewind()
        assert saved.status() == "running"
        assert os.pread(saved.ram, 11, 48 << 20) == bytes(11)
    machine.check()
    # A reset by the guest ends QEMU as before.
    machine._monitor("o /b 0xcf9 6")
    assert "was reset from inside" in lost(machine).message


def test_rewind_guest_stopped_by_somebody_runs_again(stack: ExitStack, tmp_path: Path) -> None:
    saved = Saved(stack, tmp_path / "saved", asleep(tmp_path))
    saved.machine._qmp.execute("stop")  # behind the machine's back
    assert isinstance(lost(saved.machine), GuestStoppedError)
    saved.rewind()
    assert saved.status() == "running"


def test_rewind_qemu_gone_stays_lost(stack: ExitStack, tmp_path: Path) -> None:
    saved = Saved(stack, tmp_path / "saved", asleep(tmp_path))
    saved.machine._monitor("o /h 0x604 0x2400")
    assert isinstance(lost(saved.machine), GuestStoppedError)
    saved.machine._process.kill()
    with pytest.raises(GuestStoppedError):
        saved.machine.rewind(lambda: None)


def test_kvm_internal_error_is_lost_at_once_and_rewind_rescues(
    stack: ExitStack, tmp_path: Path
) -> None:
    """A real one: the guest executes what this KVM cannot."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm, open to this user; the words are tested without it")
    # 0: cmp byte [0x7000], 0; je 0: wait for a sign.
    # popcnt ax, ax: for a KVM that emulates. jmp 0xa000:0: no memory, for one that does not.
    action = bytes.fromhex("803e007000 74f9 f30fb8c0 ea000000a0")
    config = asleep(tmp_path, Accelerator("kvm", "test"), action)
    config = replace(config, cpu="host,-arch-capabilities")
    saved = Saved(stack, tmp_path / "saved", config)
    for _ in range(2):
        os.pwrite(saved.ram, b"\1", 0x7000)
        reason = lost(saved.machine)
        assert isinstance(reason, GuestStoppedError)
        assert "internal-error" in reason.message
        assert "KVM internal error. Suberror" in reason.evidence
        assert "--accel tcg" in reason.hint
        saved.rewind()
        assert saved.status() == "running"
    saved.machine.check()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("internal-error", "the processor of the guest stopped: the accelerator"),
        ("watchdog", "watchdog expired"),
        ("guest-panicked", "panicked"),
        ("suspended", "suspended"),
        ("shutdown", "shut down"),
    ],
)
def test_loss_by_status_stopped_for_good_is_lost_whoever_stopped_it(
    status: str, words: str
) -> None:
    for asked in (False, True):
        loss = loss_by_status(status, asked=asked, stderr="QEMU's words", disk_errors=())
        assert loss is not None
        assert words in loss.message
        assert loss.evidence == "QEMU's words"


@pytest.mark.parametrize("status", ["running", "save-vm", "restore-vm", "finish-migrate", ""])
def test_loss_by_status_goes_on_is_not_lost(status: str) -> None:
    assert loss_by_status(status, asked=False, stderr="", disk_errors=()) is None
