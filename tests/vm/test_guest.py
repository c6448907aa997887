# SPDX-License-Identifier: Apache-2.0
"""The machine with the project's own guest in it: ready, reached, lost in every way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.device.ivshmem import IvshmemServer
from bridge.device.region import Region
from bridge.errors import (
    GuestLostError,
    GuestPanicError,
    GuestPoweredOffError,
    RunTimeoutError,
)
from bridge.guest.guest_image import ProjectImage
from bridge.guest.images import Image
from bridge.guest.ssh import SshGuest
from bridge.targets import TARGET_ADDRESS, Endpoint
from bridge.vm.accel import Accelerator, choose_accelerator
from bridge.vm.agent import Ready
from bridge.vm.config import MachineConfig
from bridge.vm.machine import Ending, Machine, State
from tests.support.programs import guest_image
from tests.vm.support import echo, tcp_service

pytestmark = pytest.mark.vm

PROMPTLY = 5.0
"""Seconds in which the loss of a guest must be told; TCP would need minutes."""


@dataclass
class Booted:
    """A guest that is ready, and how to reach it."""

    machine: Machine
    guest: SshGuest
    ready: Ready


@pytest.fixture(scope="module")
def image() -> Image:
    return guest_image()


def test_guest_under_tcg_does_not_check_its_timer(image: Image) -> None:
    """A busy host would fail that check, which is a panic."""
    for accelerator, wanted in (
        (Accelerator("tcg", "test"), True),
        (Accelerator("kvm", "test"), False),
    ):
        config = ProjectImage(image).machine_config(Settings(), accelerator)
        assert ("no_timer_check" in config.cmdline.split()) == wanted


@contextlib.contextmanager
def boot(image: Image, console: Path, endpoints: tuple[Endpoint, ...] = ()) -> Iterator[Booted]:
    """Boot the image with a kcov device and connect to it."""
    config = MachineConfig(
        choose_accelerator(),
        kernel=image.kernel,
        initrd=image.initrd,
        disk=image.root,
        cmdline=image.cmdline,
        endpoints=endpoints,
        boot_timeout=120,
    )
    with contextlib.ExitStack() as stack:
        region = Region(16 << 20)
        stack.callback(region.close)
        server = IvshmemServer(region)
        stack.callback(server.close)
        doorbell = stack.enter_context(server.connect())
        machine = stack.enter_context(Machine(config, doorbell=doorbell, console_path=console))
        machine.start()
        ready = machine.wait_ready()
        guest = SshGuest(
            machine.ssh_port, image.ssh_key, image.host_key.read_text(), watched=machine
        )
        stack.enter_context(guest)
        guest.connect(60)
        yield Booted(machine, guest, ready)


@pytest.fixture(scope="module")
def echo_port() -> Iterator[int]:
    """The port of a service on the host that sends back everything that comes."""
    with tcp_service(echo) as port:
        yield port


@pytest.fixture(scope="module")
def booted(
    image: Image, echo_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Booted]:
    """One guest for all tests that leave it whole."""
    console = tmp_path_factory.mktemp("guest") / "console.log"
    with boot(image, console, (Endpoint("echo", echo_port, 5000),)) as booted:
        yield booted


def test_guest_boots_reports_kernel_and_device(booted: Booted, image: Image) -> None:
    ready = booted.ready
    assert ready.kernel == image.kernel_release
    assert ready.device.startswith("/sys/kernel/debug/kcov")
    assert ready.uptime_ms > 0
    assert ready.mem_available_kib > 64 * 1024
    assert booted.machine.state is State.READY
    assert booted.guest.run("uname -r").text.strip() == image.kernel_release
    assert booted.guest.run(["test", "-c", ready.device]).exit_status != 127


def test_commands_end_as_they_do_everywhere(booted: Booted) -> None:
    guest = booted.guest
    assert guest.run("exit 7").exit_status == 7
    assert guest.run(["no-such-command"]).exit_status == 127
    assert guest.run("kill -9 $$").exit_status == 137
    assert guest.run(["printf", "%s", "a  'b' $c"]).stdout == b"a  'b' $c"


def test_run_timeout_kills_the_command_in_the_guest(booted: Booted) -> None:
    guest = booted.guest
    with pytest.raises(RunTimeoutError):
        guest.run("sleep 4321 & sleep 4322", timeout=2)
    script = "grep -l -s -z -e '^432[12]$' /proc/[0-9]*/cmdline || true"
    assert guest.run(script).text == ""


def test_files_go_there_and_back(booted: Booted, tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    (tmp_path / "there").write_bytes(data)
    booted.guest.put(tmp_path / "there", "/run/there", 0o700)
    assert booted.guest.run("stat -c %a:%s /run/there").text == "700:1000000\n"
    booted.guest.get("/run/there", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_endpoint_many_connections_are_served(booted: Booted) -> None:
    ask = f"exec 3<>/dev/tcp/{TARGET_ADDRESS}/5000; echo $0 >&3; head -n 1 <&3"
    for number in range(3):
        result = booted.guest.run(["bash", "-c", ask, str(number)], timeout=30)
        assert result.text == f"{number}\n"
    script = f"for i in 1 2 3 4; do bash -c '{ask}' $i & done; wait"
    result = booted.guest.run(script, timeout=60)
    assert sorted(result.text.split()) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("address", ["10.0.2.2", "10.0.2.3", TARGET_ADDRESS])
def test_network_other_addresses_are_unreachable(
    booted: Booted, echo_port: int, address: str
) -> None:
    # The very port that the target listens on, on every address that QEMU's network has.
    ask = f"exec 3<>/dev/tcp/{address}/{echo_port}"
    result = booted.guest.run(["timeout", "4", "bash", "-c", ask], timeout=30)
    assert result.exit_status != 0


def test_rubbish_on_the_report_channel_harms_nothing(booted: Booted) -> None:
    before = booted.machine.ignored_reports
    script = "(echo '{\"state\":'; head -c 20000 /dev/urandom; echo; echo '[]') > /dev/ttyS1"
    booted.guest.run(script, check=True)
    deadline = time.monotonic() + 20
    while booted.machine.ignored_reports < before + 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert booted.machine.ignored_reports >= before + 3
    booted.machine.check()
    assert booted.guest.run("true").exit_status == 0


def test_console_boot_is_recorded(booted: Booted) -> None:
    booted.guest.run("echo a mark on the console > /dev/ttyS0", check=True)
    deadline = time.monotonic() + 10
    while "a mark on" not in booted.machine.console.tail() and time.monotonic() < deadline:
        time.sleep(0.05)
    path = booted.machine.console.path
    assert path is not None
    assert b"a mark on the console" in path.read_bytes()


def test_powerdown_ready_guest_powers_off(image: Image, tmp_path: Path) -> None:
    with boot(image, tmp_path / "console.log") as booted:
        pid = booted.machine.pid
        assert booted.machine.powerdown(30) is Ending.POWERDOWN
        assert booted.machine.loss is None
        assert not Path(f"/proc/{pid}").exists()


Lose = Callable[[Booted], str]


def panic(_: Booted) -> str:
    return "echo 1 > /proc/sys/kernel/sysrq; sleep 0.5; echo c > /proc/sysrq-trigger; sleep 100"


def switch_off(_: Booted) -> str:
    return "sleep 0.5; poweroff; sleep 100"


def restart(_: Booted) -> str:
    return "sleep 0.5; reboot; sleep 100"


def kill_qemu(booted: Booted) -> str:
    threading.Timer(0.5, os.kill, (booted.machine.pid, signal.SIGKILL)).start()
    return "sleep 100"


@pytest.mark.parametrize(
    ("lose", "error", "message"),
    [
        (panic, GuestPanicError, "sysrq triggered crash"),
        (switch_off, GuestPoweredOffError, "was switched off from inside"),
        (restart, GuestPoweredOffError, "was reset from inside"),
        (kill_qemu, GuestLostError, "QEMU was killed by SIGKILL"),
    ],
)
def test_run_guest_is_lost_ends_at_once(
    image: Image, tmp_path: Path, lose: Lose, error: type[GuestLostError], message: str
) -> None:
    with boot(image, tmp_path / "console.log") as booted:
        told: list[float] = []
        booted.machine.add_loss_listener(lambda _: told.append(time.monotonic()))
        with pytest.raises(error, match=message) as caught:
            booted.guest.run(lose(booted), timeout=60)
        ended = time.monotonic()
        while not told and time.monotonic() < ended + PROMPTLY:
            time.sleep(0.01)
        assert abs(ended - told[0]) < PROMPTLY
        assert type(caught.value) is error
        assert booted.machine.state is State.LOST
        with pytest.raises(error):
            booted.guest.run("true")
        if lose is panic:
            assert "GUEST_PANICKED" in {event["event"] for event in booted.machine.events}
            assert "Kernel panic" in caught.value.evidence
        assert booted.machine.powerdown() in (Ending.GONE, Ending.QUIT, Ending.KILL)
