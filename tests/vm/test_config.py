# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line, piece by piece."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bridge.errors import QemuError, UsageError
from bridge.targets import TARGET_ADDRESS, Endpoint, QemuDevice
from bridge.vm.accel import Accelerator
from bridge.vm.config import BackendFds, MachineConfig, paste_command, qemu_command
from bridge.vm.network import EpochWord, find_ssh_port, netdev_option

TCG = Accelerator("tcg", "test")
KVM = Accelerator("kvm", "test")
FDS = BackendFds(qmp=10, console=11, report=12, doorbell=13)


def options(command: list[str], name: str) -> list[str]:
    """All values that an option is given."""
    return [value for key, value in pairwise(command) if key == name]


def test_command_backends_are_descriptors() -> None:
    command = qemu_command(MachineConfig(TCG), FDS)
    assert options(command, "-chardev") == [
        "socket,id=qmp,fd=10",
        "socket,id=console,fd=11",
        "socket,id=report,fd=12",
        "socket,id=kcov,fd=13",
    ]
    assert options(command, "-serial") == ["chardev:console", "chardev:report"]
    assert "ivshmem-doorbell,chardev=kcov,vectors=2,master=on" in options(command, "-device")
    assert FDS.all == (10, 11, 12, 13)


def test_command_no_doorbell_has_no_ivshmem_device() -> None:
    fds = BackendFds(10, 11, 12)
    command = qemu_command(MachineConfig(TCG), fds)
    assert not any("ivshmem" in word or "kcov," in word for word in command)
    assert fds.all == (10, 11, 12)


def test_command_channel_is_a_port_of_its_own_controller() -> None:
    command = qemu_command(MachineConfig(TCG), BackendFds(10, 11, 12, channel=14))
    assert "socket,id=agent,fd=14" in options(command, "-chardev")
    assert options(command, "-device")[-2:] == [
        "virtio-serial-pci,id=agent-ports",
        "virtserialport,bus=agent-ports.0,chardev=agent,name=kcov-bridge.agent",
    ]
    assert not any("agent" in word for word in qemu_command(MachineConfig(TCG), FDS))


def test_command_shared_memory_only_where_a_device_needs_it() -> None:
    device = QemuDevice("it", ("-device", "it"), can_be_saved=False, shared_memory=True)
    command = qemu_command(MachineConfig(TCG, devices=(device,), memory_mib=300), FDS)
    assert options(command, "-object") == ["memory-backend-memfd,id=ram,size=300M,share=on"]
    assert "memory-backend=ram" in options(command, "-machine")
    assert options(qemu_command(MachineConfig(TCG), FDS), "-object") == []


def test_processor_and_boot_time_follow_the_accelerator() -> None:
    tcg, kvm = MachineConfig(TCG), MachineConfig(KVM)
    assert options(qemu_command(tcg, FDS), "-cpu") == ["max,la57=off"]
    assert options(qemu_command(kvm, FDS), "-cpu") == ["host"]
    assert options(qemu_command(MachineConfig(KVM, cpu="Nehalem"), FDS), "-cpu") == ["Nehalem"]
    assert tcg.boot_seconds > kvm.boot_seconds
    assert MachineConfig(TCG, boot_timeout=3.0).boot_seconds == 3.0


def test_kernel_cmdline_given_arguments_win(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.touch()
    config = MachineConfig(TCG, kernel=kernel, cmdline="quiet panic=5 console=ttyS0,115200")
    assert config.kernel_cmdline == "quiet panic=5 console=ttyS0,115200"
    config = MachineConfig(TCG, kernel=kernel, cmdline="quiet")
    assert options(qemu_command(config, FDS), "-append") == ["console=ttyS0 panic=-1 quiet"]


def test_disks(tmp_path: Path) -> None:
    disk, raw, qcow2 = (tmp_path / name for name in ("a,b.squashfs", "raw.img", "image"))
    disk.touch()
    raw.write_bytes(b"\0" * 512)
    qcow2.write_bytes(b"QFI\xfb" + b"\0" * 512)
    drives = options(qemu_command(MachineConfig(TCG, disk=disk, image=raw), FDS), "-drive")
    assert drives == [
        f"if=none,id=disk,format=raw,readonly=on,file={tmp_path}/a,,b.squashfs",
        f"if=none,id=image,format=raw,snapshot=on,file={raw}",
    ]
    (drive,) = options(qemu_command(MachineConfig(TCG, image=qcow2), FDS), "-drive")
    assert "format=qcow2,snapshot=on" in drive


def test_sandbox_spawn_is_allowed_only_for_relays() -> None:
    (closed,) = options(qemu_command(MachineConfig(TCG), FDS), "-sandbox")
    assert closed == "on,obsolete=deny,resourcecontrol=deny,elevateprivileges=deny,spawn=deny"
    endpoints = (Endpoint("9p", 4000, 564),)
    (opened,) = options(qemu_command(MachineConfig(TCG, endpoints=endpoints), FDS), "-sandbox")
    assert opened == "on,obsolete=deny,resourcecontrol=deny,elevateprivileges=allow,spawn=allow"
    command = qemu_command(MachineConfig(TCG, endpoints=endpoints, network=False), FDS)
    assert "-netdev" not in command
    assert options(command, "-sandbox")[0].endswith("spawn=deny")
    assert not options(qemu_command(MachineConfig(TCG, sandbox=False), FDS), "-sandbox")


def test_command_extra_args_come_last() -> None:
    config = MachineConfig(TCG, extra_args=("-global", "x=y"))
    assert qemu_command(config, FDS)[-2:] == ["-global", "x=y"]


def test_paste_command_has_no_descriptor(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.touch()
    pasted = paste_command(MachineConfig(TCG, kernel=kernel, cmdline="a b"))
    assert "fd=" not in pasted
    assert "-append 'console=ttyS0 panic=-1 a b'" in pasted


@pytest.mark.parametrize(
    "settings",
    [
        {"memory_mib": 8},
        {"cpus": 0},
        {"kernel": Path("/no/such/kernel")},
        {"disk": Path("/")},
        {"initrd": Path(__file__)},
    ],
)
def test_config_impossible_value_is_a_usage_error(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        MachineConfig(TCG, **settings)  # type: ignore[arg-type]


def test_netdev_is_restricted_except_for_ssh_and_targets() -> None:
    option = netdev_option("net", [Endpoint("9p", 4000, 564), Endpoint("nbd", 4001, 10809)])
    parts = option.split(",")
    assert parts[:2] == ["user", "id=net"]
    assert "restrict=on" in parts
    assert "hostfwd=tcp:127.0.0.1:0-10.0.2.15:22" in parts
    forwards = [part for part in parts if part.startswith("guestfwd=")]
    assert [part.partition("-cmd:")[0] for part in forwards] == [
        f"guestfwd=tcp:{TARGET_ADDRESS}:564",
        f"guestfwd=tcp:{TARGET_ADDRESS}:10809",
    ]
    assert [part.split()[-1] for part in forwards] == ["4000", "4001"]
    assert "hostfwd" not in netdev_option("net", ssh=False)
    epoch = EpochWord("/proc/1/fd/3", 256)
    told = netdev_option("net", [Endpoint("9p", 4000, 564)], coverage_epoch=epoch)
    assert told.split()[-4:] == ["4000", "--epoch", "/proc/1/fd/3", "256"]


@pytest.mark.parametrize(
    ("endpoints", "ssh_port"),
    [
        ([Endpoint("a", 0, 1)], 0),
        ([Endpoint("a", 1, 70000)], 0),
        ([Endpoint("a", 1, 5), Endpoint("b", 2, 5)], 0),
        ([], 65536),
        ([], -1),
    ],
)
def test_impossible_ports(endpoints: list[Endpoint], ssh_port: int) -> None:
    with pytest.raises(UsageError):
        netdev_option("net", endpoints, ssh_port=ssh_port)


def test_find_ssh_port_reads_qemus_answer() -> None:
    answer = (
        "Hub -1 (net):\r\n"
        "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
        "  TCP[HOST_FORWARD]   3       127.0.0.1 35307       10.0.2.15    22     0     0\r\n"
    )
    assert find_ssh_port(answer) == 35307
    with pytest.raises(QemuError):
        find_ssh_port("Hub -1 (net):\n")
