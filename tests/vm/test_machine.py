# SPDX-License-Identifier: Apache-2.0
"""A real QEMU without a guest: started, watched, stopped, killed, and started wrongly."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.device.ivshmem import IvshmemServer
from bridge.device.region import Region
from bridge.errors import (
    BootTimeoutError,
    BridgeError,
    GuestLostError,
    GuestPanicError,
    GuestPoweredOffError,
    GuestSetupError,
    MissingDependencyError,
    QemuError,
    UsageError,
)
from bridge.targets import Endpoint
from bridge.vm.config import MachineConfig
from bridge.vm.machine import Ending, Machine, State
from tests.vm.support import EMPTY, POWER_OFF, READY, RESET, TCG, boot_sector, lost


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_machine_starts_and_quits(machine: Machine) -> None:
    assert machine.state.value == "booting"
    status = machine.execute("query-status")
    assert isinstance(status, dict)
    assert status["status"] == "running"
    machine.check()
    pid = machine.pid
    with socket.create_connection(("127.0.0.1", machine.ssh_port), 5):
        pass
    assert machine.powerdown() is Ending.QUIT
    assert gone(pid)
    assert machine.loss is None
    machine.close()
    assert machine.state is State.CLOSED
    with pytest.raises(UsageError, match="closed"):
        machine.check()


def test_closing_leaves_nothing_and_may_be_repeated() -> None:
    with Machine(EMPTY) as first:
        first.start()
    before, threads = open_descriptors(), threading.active_count()
    for _ in range(3):
        with Machine(EMPTY) as machine:
            machine.start()
            pid = machine.pid
        machine.close()
        assert gone(pid)
    assert open_descriptors() == before
    assert threading.active_count() == threads


def test_close_never_started_is_allowed() -> None:
    machine = Machine(EMPTY)
    machine.close()
    machine.close()
    with pytest.raises(UsageError):
        machine.start()


def test_execute_refused_command_is_a_qemu_error(machine: Machine) -> None:
    with pytest.raises(QemuError, match="no-such-command"):
        machine.execute("no-such-command")
    machine.check()


def test_wait_ready_silent_guest_times_out(tmp_path: Path) -> None:
    config = MachineConfig(TCG, memory_mib=64, boot_timeout=1.0)
    console = tmp_path / "console.log"
    with Machine(config, console_path=console) as machine:
        started = time.monotonic()
        machine.start()
        with pytest.raises(BootTimeoutError, match="1 s under tcg") as caught:
            machine.wait_ready()
        assert 0.9 < time.monotonic() - started < 3
        assert caught.value.evidence
    assert console.exists()


def test_killed_qemu_is_reported_at_once_to_all_listeners(machine: Machine) -> None:
    told: list[BridgeError] = []
    machine.add_loss_listener(told.append)
    machine.add_loss_listener(told.append)()  # and taken away again
    threading.Timer(0.3, os.kill, (machine.pid, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(QemuError, match="killed by SIGKILL while the guest booted"):
        machine.wait_ready()
    assert time.monotonic() - started < 3
    assert [error.message for error in told] == [machine.loss.message if machine.loss else ""]
    with pytest.raises(QemuError):
        machine.check()
    with pytest.raises(QemuError):
        machine.execute("query-status")
    late: list[BridgeError] = []
    machine.add_loss_listener(late.append)
    assert late == told
    assert machine.powerdown() is Ending.GONE


def test_powerdown_stopped_qemu_is_killed(machine: Machine) -> None:
    os.kill(machine.pid, signal.SIGSTOP)
    pid = machine.pid
    assert machine.powerdown() is Ending.KILL
    assert gone(pid)


def test_qemu_is_missing() -> None:
    with Machine(MachineConfig(TCG, qemu="no-such-qemu")) as machine:
        with pytest.raises(MissingDependencyError, match="no-such-qemu") as caught:
            machine.start()
        assert "kcov-bridge setup" in caught.value.hint
        assert machine.state is State.CLOSED


def test_start_unknown_option_is_a_qemu_error() -> None:
    before = open_descriptors()
    with Machine(MachineConfig(TCG, extra_args=("-no-such-option",))) as machine:
        with pytest.raises(QemuError, match="exited with status 1") as caught:
            machine.start()
        assert "-no-such-option: invalid option" in caught.value.evidence
        assert "qemu-system-x86_64 " in caught.value.evidence
    assert open_descriptors() <= before + 1


def test_start_program_is_not_qemu_is_a_qemu_error(tmp_path: Path) -> None:
    fake = tmp_path / "qemu"
    fake.write_text(
        "#!/bin/sh\necho 'ivshmem-doorbell' is not a valid device model name >&2\nexit 1"
    )
    fake.chmod(0o755)
    with pytest.raises(MissingDependencyError, match="lacks a device"):
        Machine(MachineConfig(TCG, qemu=str(fake))).start()


def test_start_too_much_memory_is_a_qemu_error() -> None:
    with pytest.raises(QemuError, match="exited"):
        Machine(MachineConfig(TCG, memory_mib=1 << 34)).start()


def test_start_broken_kernel_is_a_qemu_error(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"this is no kernel" * 1000)
    with Machine(MachineConfig(TCG, kernel=kernel, memory_mib=64, boot_timeout=1.5)) as machine:
        machine.start()
        with pytest.raises(BootTimeoutError):
            machine.wait_ready()


def test_start_chosen_port_is_taken_is_a_usage_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is taken"):
            Machine(MachineConfig(TCG, ssh_port=port)).start()


def test_start_chosen_port_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Machine(MachineConfig(TCG, memory_mib=64, ssh_port=port)) as machine:
        machine.start()
        assert machine.ssh_port == port


def test_ssh_port_no_network_is_a_usage_error() -> None:
    with Machine(MachineConfig(TCG, memory_mib=64, network=False)) as machine:
        machine.start()
        with pytest.raises(UsageError, match="no network"):
            _ = machine.ssh_port


def test_endpoints_are_accepted_with_the_sandbox_on() -> None:
    endpoints = (Endpoint("one", 4000, 564), Endpoint("two", 4001, 565))
    with Machine(MachineConfig(TCG, memory_mib=64, endpoints=endpoints)) as machine:
        machine.start()
        answer = machine.execute("human-monitor-command", {"command-line": "info usernet"})
        assert "HOST_FORWARD" in str(answer)


def test_ivshmem_device_shows_the_region() -> None:
    region = Region(16 << 20)
    server = IvshmemServer(region)
    try:
        with server.connect() as doorbell, Machine(EMPTY, doorbell=doorbell) as machine:
            machine.start()
            doorbell.close()
            pci = str(machine.execute("human-monitor-command", {"command-line": "info pci"}))
            assert "1af4:1110" in pci
            # QEMU maps the very memory that the bridge has.
            inode = str(os.fstat(region.fd).st_ino)
            spans = [
                [int(address, 16) for address in line.split()[0].split("-")]
                for line in Path(f"/proc/{machine.pid}/maps").read_text().splitlines()
                if inode in line.split()
            ]
            assert sum(end - start for start, end in spans) == 16 << 20
    finally:
        server.close()
        region.close()


# A guest of one boot sector: it speaks on both serial ports, and then it acts.


def test_wait_ready_guest_reports_ready(booted: Callable[..., Machine], tmp_path: Path) -> None:
    machine = booted(console=b"hello\r\n", report=READY)
    ready = machine.wait_ready()
    assert ready.kernel == "6.1.0-test"
    assert ready.device == "/dev/kcov"
    assert ready.uptime_ms == 5
    assert 0 < ready.boot_seconds < 20
    assert machine.state is State.READY
    assert machine.ignored_reports == 1
    assert machine.console.tail(1) == "hello"
    assert (tmp_path / "console.log").read_bytes().endswith(b"hello\r\n")
    # It does not listen to the power button.
    assert machine.powerdown(timeout=0.3) is Ending.QUIT


def test_wait_ready_unhealthy_guest_gives_its_reason(booted: Callable[..., Machine]) -> None:
    report = b'{"state":"unhealthy","what":"module","why":"No such device"}\n'
    machine = booted(console=b"insmod failed\r\n", report=report)
    with pytest.raises(GuestSetupError, match="module: No such device") as caught:
        machine.wait_ready()
    assert "insmod failed" in caught.value.evidence


def test_qemu_killed_while_the_guest_is_ready(booted: Callable[..., Machine]) -> None:
    machine = booted(report=READY)
    machine.wait_ready()
    told = threading.Event()
    machine.add_loss_listener(lambda _: told.set())
    os.kill(machine.pid, signal.SIGKILL)
    assert told.wait(5)
    with pytest.raises(GuestLostError, match="QEMU was killed by SIGKILL"):
        machine.check()


@pytest.mark.parametrize("report", [b"", READY])
def test_guest_powers_itself_off_is_lost(booted: Callable[..., Machine], report: bytes) -> None:
    machine = booted(console=b"bye\r\n", report=report, action=POWER_OFF)
    assert lost(machine).evidence.endswith("bye")
    with pytest.raises(GuestPoweredOffError, match="was switched off from inside"):
        machine.check()


def test_guest_resets_itself_is_lost(booted: Callable[..., Machine]) -> None:
    machine = booted(action=RESET)
    with pytest.raises(GuestPoweredOffError, match="was reset from inside"):
        machine.wait_ready()
    assert {"SHUTDOWN"} <= {event["event"] for event in machine.events}


def test_guest_resets_after_a_panic_message_is_a_panic(booted: Callable[..., Machine]) -> None:
    machine = booted(
        console=b"Kernel panic - not syncing: Attempted to kill init!\r\nend\r\n", action=RESET
    )
    with pytest.raises(GuestPanicError, match="Attempted to kill init!") as caught:
        machine.wait_ready()
    assert caught.value.evidence.endswith("end")


def test_image_guest_writes_leave_the_file_unchanged(
    booted: Callable[..., Machine], tmp_path: Path
) -> None:
    # mov ax, 0x0301; mov cx, 1; mov dx, 0x80; xor bx, bx; mov es, bx; int 0x13: overwrite it
    write = bytes.fromhex("b80103 b90100 ba8000 31db 8ec3 cd13")
    machine = booted(report=READY, action=write + POWER_OFF)
    assert isinstance(lost(machine), GuestPoweredOffError)
    assert (tmp_path / "disk.img").read_bytes() == boot_sector(
        report=READY, action=write + POWER_OFF
    )


def test_loss_listener_raises_others_are_still_called(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Event()

    def fail(_: BridgeError) -> None:
        raise ValueError("mine")

    machine.add_loss_listener(fail)
    machine.add_loss_listener(lambda _: told.set())
    os.kill(machine.pid, signal.SIGKILL)
    assert told.wait(5)
    assert "a listener to the machine's loss failed" in caplog.text
