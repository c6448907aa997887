# SPDX-License-Identifier: Apache-2.0
"""Devices as a target names them: what QEMU is told, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.errors import TargetError
from bridge.targets import (
    BlockDevice,
    Device,
    QemuDevice,
    SerialPort,
    Tpm,
    VhostUserFs,
    VirtioPort,
)
from bridge.targets.description import describe
from bridge.targets.none import NoTarget

DISK = 1 << 20


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Path]:
    """The path of a Unix socket that listens; with a comma, which QEMU's options double."""
    path = tmp_path / "so,cket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield path


def target_with(*devices: object) -> NoTarget:
    """A target that names these devices."""
    target = NoTarget()
    target.devices = devices  # type: ignore[attr-defined]
    return target


def disk(name: str, address: Path | int) -> BlockDevice:
    return BlockDevice(name, address, DISK)


@pytest.mark.parametrize("kind", [SerialPort, VirtioPort, disk])
def test_as_qemu_stand_in_names_nothing_of_the_host(
    kind: Callable[[str, Path | int], Device], listening: Path
) -> None:
    for address in (listening, 12345):
        device = kind("it", address).as_qemu()
        stand_in = " ".join(device.options(connected=False))
        assert "it" in stand_in
        assert str(address).replace(",", ",,") not in stand_in
        assert str(address) not in stand_in


def test_as_qemu_devices_of_one_kind_and_name_have_one_stand_in(listening: Path) -> None:
    for one, other in (
        (SerialPort("it", listening), SerialPort("it", 4000)),
        (VirtioPort("it", listening), VirtioPort("it", 4000)),
        (BlockDevice("it", listening, DISK), BlockDevice("it", 4000, DISK)),
    ):
        options = [each.as_qemu().options(connected=False) for each in (one, other)]
        assert options[0] == options[1]
    disks = [BlockDevice("it", 4000, size).as_qemu() for size in (DISK, 2 * DISK)]
    sizes = {each.options(connected=False) for each in disks}
    assert len(sizes) == 2


def test_as_qemu_a_path_is_absolute_and_escaped(
    listening: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(listening.parent)
    device = VirtioPort("it", Path(listening.name)).as_qemu()
    escaped = str(listening).replace(",", ",,")
    assert f"socket,id=target-it-link,path={escaped}" in device.arguments


@pytest.mark.parametrize("kind", [VhostUserFs, Tpm])
def test_as_qemu_a_device_with_a_back_end_on_a_socket_cannot_be_saved(
    kind: Callable[[str, Path], Device], listening: Path
) -> None:
    device = kind("it", listening).as_qemu()
    assert not device.can_be_saved
    assert device.shared_memory == (kind is VhostUserFs)
    (chardev,) = (word for word in device.arguments if word.startswith("socket,id="))
    assert chardev.endswith(str(listening).replace(",", ",,"))
    assert any("target-it-link" in word for word in device.arguments if word != chardev)
    assert QemuDevice.from_dict(dataclasses.asdict(device)) == device


def test_as_qemu_a_terminal_gets_the_back_end_for_terminals() -> None:
    master, slave = os.openpty()
    with contextlib.closing(os.fdopen(master)), contextlib.closing(os.fdopen(slave)):
        path = os.ttyname(slave)
        (command,) = SerialPort("it", Path(path)).as_qemu().on_start
    assert command[1]["backend"] == {"type": "serial", "data": {"device": path}}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (SerialPort("", 4000), "cannot have the name ''"),
        (SerialPort("a b", 4000), "cannot have the name 'a b'"),
        (SerialPort("x" * 21, 4000), "cannot have the name"),
        (SerialPort("it", 0), "port 0"),
        (SerialPort("it", True), "at True"),
        (SerialPort("it", Path("/nowhere/socket")), "No such file"),
        (VirtioPort("it", Path("/dev")), "no socket"),
        (VirtioPort("it", "/run/it"), "pathlib.Path"),  # type: ignore[arg-type]
        (BlockDevice("it", 4000, size=1000), "1000 bytes"),
        (Tpm("it", 4000), "no Unix socket"),  # type: ignore[arg-type]
        (VhostUserFs("it", Path("/nowhere/socket")), "No such file"),
        (QemuDevice("it", "-device edu"), "must be a tuple of texts"),  # type: ignore[arg-type]
        (QemuDevice("it", (), on_start=(("stop",),)), "on_start"),  # type: ignore[arg-type]
        (QemuDevice("a/b", ()), "cannot have the name 'a/b'"),
    ],
)
def test_describe_a_device_that_cannot_be_is_a_target_error(device: Device, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        describe(target_with(device))
    assert "target none" in caught.value.message
    assert message in caught.value.report()
    assert caught.value.hint


def test_describe_two_devices_of_one_name_are_a_target_error() -> None:
    with pytest.raises(TargetError, match="two devices have the name 'it'"):
        describe(target_with(SerialPort("it", 4000), VirtioPort("it", 4001)))


def test_describe_modules_of_devices_come_first_and_once() -> None:
    target = target_with(VirtioPort("one", 4000), VirtioPort("two", 4001))
    target.guest_modules = ("9p",)
    assert describe(target).modules == ("virtio_console", "9p")
