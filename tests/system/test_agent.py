# SPDX-License-Identifier: Apache-2.0
"""The guest's programs in a real guest: kcov-exec, kcov-doc, and the agent as process 1.

The device gives one PC for each system call here (``syscall_pcs``), so what a program did can be
counted exactly, without any target.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.errors import BridgeError, GuestPoweredOffError, GuestSetupError
from bridge.guest.guest import CommandResult
from bridge.guest.ssh import SshGuest
from bridge.session.session import Session
from bridge.sources.pcs import syscall_pc
from bridge.vm.accel import choose_accelerator
from bridge.vm.config import MachineConfig
from bridge.vm.machine import Machine
from tests.support.programs import guest_image, guest_program

pytestmark = pytest.mark.vm

SCHED_GETSCHEDULER = 145
"""arch/x86/entry/syscalls/syscall_64.tbl"""

SETTINGS = Settings(target="none", source="python", syscall_pcs=True, region=64)
"""A region of 64 MiB holds sixteen areas of the size that kcov-exec makes by default."""

CALLS = 10
THREADS = 100
"""As in follow.c."""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    out = tmp_path_factory.mktemp("agent")
    program = guest_program(Path(__file__).with_name("follow.c"))
    with Session(SETTINGS, out) as session:
        session.put(program, "/usr/local/bin/follow", 0o755)
        yield session


def run(session: Session, command: str) -> CommandResult:
    return session.guest.run(command, timeout=60)


def calls(text: str) -> int:
    pc = syscall_pc(SCHED_GETSCHEDULER)
    assert pc is not None
    return text.split().count(f"{pc:#018x}")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("sh -c 'exit 7'", 7),
        ("true", 0),
        ("sh -c 'kill -9 $$'", 128 + 9),
        ("sh -c 'kill -TERM $$'", 128 + 15),
        ("/no/such/program", 127),
        ("no-such-program", 127),
        ("/etc/hosts", 126),
    ],
)
@pytest.mark.parametrize("option", ["", "-f"])
def test_kcov_exec_exit_status_is_the_commands(
    session: Session, option: str, command: str, status: int
) -> None:
    assert run(session, f"kcov-exec {option} -- {command}").exit_status == status


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("kcov-exec", "no command given"),
        ("kcov-exec -n 3 -- true", "multiple of 512"),
        ("kcov-exec -n x -- true", "multiple of 512"),
        ("kcov-exec -n 268434944 -- true", "no room for the area; choose a smaller -n"),
        ("kcov-exec -o /no/such/file -- true", "can't write to /no/such/file"),
        ("KCOV_EXEC_DEVICE=/dev/null kcov-exec -- true", "this is no kcov device"),
        ("KCOV_EXEC_DEVICE=/no kcov-exec -- true", "can't open /no"),
        ("KCOV_EXEC_LIBRARY=/no kcov-exec -f -- true", "set KCOV_EXEC_LIBRARY"),
    ],
)
def test_kcov_exec_own_failure_is_125_with_a_remedy(
    session: Session, command: str, said: str
) -> None:
    result = run(session, command)
    assert result.exit_status == 125
    assert said in result.stderr.decode()


def test_kcov_exec_one_thread_records_its_calls(session: Session) -> None:
    result = run(session, "kcov-exec -o - -- follow calls")
    assert calls(result.text) == CALLS
    assert all(int(pc, 16) >= 0xFFFFFFFF80000000 for pc in result.text.split())


def test_kcov_exec_no_follow_leaves_children_out(session: Session) -> None:
    assert calls(run(session, "kcov-exec -o - -- follow processes").text) == CALLS


def test_kcov_exec_follow_exit_kill_and_exec_lose_nothing(session: Session) -> None:
    result = run(session, "kcov-exec -f -v -o - -- follow processes")
    assert result.exit_status == 0, result.stderr
    assert calls(result.text) == 4 * CALLS
    lines = result.stderr.decode().splitlines()
    names = [line.split()[2] for line in lines if line.endswith(" PCs")]
    assert sorted(names) == ["exe:", "follow:", "follow:", "follow:"], "each process in a line"
    assert names[-1] == "follow:", "in the order in which they ended"


def test_kcov_exec_follow_hundred_threads_reuse_areas(session: Session) -> None:
    """A hundred threads after each other: far more than the region has room for at once."""
    result = run(session, "kcov-exec -f -o - -- follow threads")
    assert result.exit_status == 0, result.stderr
    assert result.stderr == b""
    assert calls(result.text) == (THREADS + 2) * CALLS


def test_kcov_exec_follow_exec_from_a_thread_keeps_its_trace(session: Session) -> None:
    result = run(session, "kcov-exec -f -o - -- follow exec")
    assert result.exit_status == 0, result.stderr
    assert calls(result.text) == CALLS


def test_kcov_exec_follow_shell_script_records_each_process(session: Session) -> None:
    script = "follow calls; (follow calls; follow calls) | cat; echo $(follow calls)"
    result = run(session, f"kcov-exec -f -o /tmp/pcs -- sh -c {shlex.quote(script)}; cat /tmp/pcs")
    assert calls(result.text) == 4 * CALLS


def test_kcov_exec_follow_process_outlives_the_command_its_calls_are_written(
    session: Session,
) -> None:
    script = "(follow calls; exec sleep 30) & sleep 1"
    result = run(session, f"kcov-exec -f -o /tmp/pcs -- sh -c {shlex.quote(script)}; cat /tmp/pcs")
    assert calls(result.text) == CALLS


def test_kcov_exec_full_area_is_reported(session: Session) -> None:
    result = run(session, "kcov-exec -n 512 -o - -- sh -c 'for i in $(seq 400); do :>/tmp/x; done'")
    assert len(result.text.split()) == 511
    assert "the area is full, PCs were lost" in result.stderr.decode()


def test_kcov_exec_signal_is_passed_on(session: Session) -> None:
    script = "trap 'exit 3' TERM; sleep 30 & wait"
    command = f"kcov-exec -o /tmp/pcs -- sh -c {shlex.quote(script)} & sleep 1; kill $!; wait $!"
    result = run(session, f"{command}; echo $?; wc -l < /tmp/pcs")
    status, lines = map(int, result.text.split())
    assert status == 3
    assert lines > 0


def test_kcov_exec_streams_and_descriptors_are_the_commands(session: Session) -> None:
    result = run(
        session, "echo hello | kcov-exec -f -- cat; kcov-exec -f -- env | wc -l; env | wc -l"
    )
    hello, under, without = result.text.split()
    assert hello == "hello"
    assert int(under) == int(without) + 2, "LD_PRELOAD and the socket's name, no more"
    leaked = run(session, "kcov-exec -f -- sh -c 'readlink /proc/self/fd/*'")
    assert "kcov" not in leaked.text


def test_kcov_doc_reads_one_pc_for_one_call(session: Session) -> None:
    plain = run(session, "kcov-doc")
    assert plain.exit_status == 0, plain.stderr
    assert plain.text.split() == [f"{syscall_pc(0):#x}"], "read is system call 0"
    assert run(session, "kcov-doc /etc/hosts").exit_status == 0
    assert run(session, "kcov-doc /no/such/file").exit_status == 1


def test_guest_has_memory_and_modules_for_targets(session: Session) -> None:
    assert session.ready is not None
    assert session.ready.mem_available_kib > 150 * 1024, "of 256 MiB"
    assert run(session, "modprobe -a 9p 9pnet_virtio nbd vhci-hcd").exit_status == 0
    assert "warning" not in run(session, "dmesg").text.lower()


def test_guest_writes_go_to_memory(session: Session) -> None:
    result = run(session, "echo x >> /etc/hosts && rm /bin/ls && echo > /dev/vda")
    assert result.exit_status != 0
    assert "I/O error" in result.stderr.decode(), "the disk is read-only"
    guest_image().check(contents=True)
    run(session, "sed -i '$d' /etc/hosts")


def test_agent_no_device_reports_it_and_serves_ssh(tmp_path: Path) -> None:
    image = guest_image()
    config = MachineConfig(
        accelerator=choose_accelerator("auto"),
        kernel=image.kernel,
        initrd=image.initrd,
        cmdline=image.cmdline,
        disk=image.root,
    )
    with Machine(config, console_path=tmp_path / "console.log") as machine:
        machine.start()
        guest = SshGuest(
            machine.ssh_port, image.ssh_key, image.host_key.read_text(), watched=machine
        )
        with guest:
            with pytest.raises(GuestSetupError, match="module") as caught:
                machine.wait_ready()
            assert "No such device" in caught.value.report()
            guest.connect()
            assert guest.run(["uname", "-r"], timeout=60).text.strip() == image.kernel_release


@pytest.fixture
def own_session(tmp_path: Path) -> Iterator[Session]:
    """A guest that does not outlive the test."""
    with Session(SETTINGS, tmp_path) as session:
        yield session


def test_agent_power_button_ends_the_guest(own_session: Session) -> None:
    machine = own_session.machine
    lost = threading.Event()
    machine.add_loss_listener(lambda error: lost.set())
    machine.execute("system_powerdown")
    assert lost.wait(60), machine.console.tail(20)
    assert isinstance(machine.loss, GuestPoweredOffError)
    assert "Power down" in machine.console.tail(5)


@pytest.mark.parametrize("command", ["poweroff", "poweroff -f", "reboot", "kill -TERM 1"])
def test_agent_command_ends_the_guest(own_session: Session, command: str) -> None:
    with pytest.raises(BridgeError) as caught:
        own_session.guest.run(f"{command}; sleep 60", timeout=90)
    assert isinstance(caught.value, GuestPoweredOffError), caught.value.report()
    assert isinstance(own_session.machine.loss, GuestPoweredOffError)
