# SPDX-License-Identifier: Apache-2.0
"""Devices that QEMU gives the guest and a target serves on the host.

A target returns them as its member ``devices``. Each describes itself to QEMU as a
:class:`QemuDevice`; the others here are ready-made ones. In the guest each has a name below
:data:`DEVICE_DIRECTORY`, which does not depend on the order in which the guest's kernel finds
things.

QEMU connects to the target when it starts, and anew at each reset of the guest. While a snapshot is
made there is no target: then QEMU gets a stand-in that the guest cannot tell from the device.
"""

from __future__ import annotations

import json
import re
import shlex
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bridge.errors import TargetError

__all__ = [
    "DEVICE_DIRECTORY",
    "BlockDevice",
    "Device",
    "QemuDevice",
    "QmpCommand",
    "SerialPort",
    "Tpm",
    "VhostUserFs",
    "VirtioPort",
    "check_device_name",
]

DEVICE_DIRECTORY = "/dev/target"
"""Where the guest finds the devices of its target, by name."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}")
"""What QEMU takes as an id, and what fits into the serial number of a virtio disk."""

_SERIAL_PORTS = "8250.nr_uarts=16"
"""Linux makes four by itself, and the guest's console and agent take two."""

_SETTLE_STEPS = 100
"""How often a set-up script looks for its device, every 50 ms."""


QmpCommand = tuple[str, Mapping[str, Any]]
"""A command of QMP and its arguments."""


def _commands(values: Iterable[Iterable[Any]]) -> tuple[QmpCommand, ...]:
    return tuple((name, dict(arguments)) for name, arguments in values)


@dataclass(frozen=True)
class QemuDevice:
    """A device as QEMU and the guest need it; any device of QEMU can be described so.

    Attributes:
        name: letters, digits, ``-`` and ``_``; a target has each name once.
        arguments: options of QEMU's command line.
        stand_in: the options in their place while a snapshot is made. They are part of the
            snapshot's name, so nothing in them may differ between runs: no path of the host, no
            port. Empty: the same as ``arguments``.
        on_start: commands of QMP, each with its arguments, executed before the guest runs: when
            QEMU has started and loaded the guest's state, and again at each reset.
        on_reset: such commands, executed at each reset while the guest is paused, before its state
            is restored.
        guest_modules: kernel modules that the guest needs for it.
        guest_setup: a shell script that root runs in the guest before the target's ``guest_setup``.
        kernel_arguments: added to the kernel's command line, each once, where the bridge gives the
            kernel one.
        can_be_saved: whether QEMU can save its state. If not, each guest boots, and none can be
            reset.
        shared_memory: whether the target maps the guest's memory, as the back end of a vhost-user
            device does.
        back_end: the path of the Unix socket of a back end that ends with its machine; one that
            ends before has failed. Empty: there is none.
    """

    name: str
    arguments: tuple[str, ...]
    stand_in: tuple[str, ...] = ()
    on_start: tuple[QmpCommand, ...] = ()
    on_reset: tuple[QmpCommand, ...] = ()
    guest_modules: tuple[str, ...] = ()
    guest_setup: str = ""
    kernel_arguments: tuple[str, ...] = ()
    can_be_saved: bool = True
    shared_memory: bool = False
    back_end: str = ""

    def as_qemu(self) -> QemuDevice:
        """Return the device itself."""
        return self

    def options(self, *, connected: bool) -> tuple[str, ...]:
        """Return QEMU's options for the device, or for its stand-in."""
        return self.arguments if connected or not self.stand_in else self.stand_in

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> QemuDevice:
        """Return the device that ``dataclasses.asdict()`` made a dictionary of."""
        return QemuDevice(
            name=values["name"],
            arguments=tuple(values["arguments"]),
            stand_in=tuple(values["stand_in"]),
            on_start=_commands(values["on_start"]),
            on_reset=_commands(values["on_reset"]),
            guest_modules=tuple(values["guest_modules"]),
            guest_setup=values["guest_setup"],
            kernel_arguments=tuple(values["kernel_arguments"]),
            can_be_saved=values["can_be_saved"],
            shared_memory=values["shared_memory"],
            back_end=values["back_end"],
        )


class Device(Protocol):
    """What a target may name as a device."""

    @property
    def name(self) -> str:
        """As :attr:`QemuDevice.name`."""

    def as_qemu(self) -> QemuDevice:
        """Return how QEMU makes it; called once, when the target has started.

        Raises:
            TargetError: it cannot be connected.
        """


@dataclass(frozen=True)
class SerialPort:
    """A serial port (16550A on PCI, Linux' driver 8250) whose other end is the target.

    Attributes:
        name: the guest's port is ``/dev/target/NAME``, a link to ``/dev/ttyS…``.
        address: where the target is: the path of a Unix socket on which it listens, a TCP port of
            127.0.0.1, or the path of a terminal (the other end of a pty), which is set to the speed
            that the guest chooses.
    """

    name: str
    address: Path | int

    def as_qemu(self) -> QemuDevice:
        """See :class:`Device`."""
        chardev = _Chardev(self.name, self.address)
        device = ("-device", f"pci-serial,id=target-{self.name},chardev={chardev.id}")
        return QemuDevice(
            name=self.name,
            # The port takes what comes at any time, so it is connected once its state is loaded.
            arguments=(*chardev.nowhere, *device),
            on_start=(("chardev-change", {"id": chardev.id, "backend": chardev.backend}),),
            on_reset=(("chardev-change", {"id": chardev.id, "backend": _NOWHERE}),),
            kernel_arguments=(_SERIAL_PORTS,),
            guest_setup=_link(
                self.name,
                # The first port on PCI that no other name leads to.
                "for tty in /sys/bus/pci/drivers/serial/*/tty/ttyS*; do "
                "  node=/dev/${tty##*/}; "
                '  [ -e "$node" ] || continue; '
                f"  for link in {DEVICE_DIRECTORY}/*; do "
                '    [ "$(readlink "$link")" != "$node" ] || continue 2; '
                "  done; "
                '  echo "$node"; break; '
                "done",
            ),
        )


@dataclass(frozen=True)
class VirtioPort:
    """A port of a virtio serial device (Linux' driver virtio_console), as guest agents use it.

    Attributes:
        name: the guest's port is ``/dev/target/NAME``, a link to ``/dev/vport…``.
        address: where the target is: the path of a Unix socket on which it listens, or a TCP port
            of 127.0.0.1.
    """

    name: str
    address: Path | int

    def as_qemu(self) -> QemuDevice:
        """See :class:`Device`."""
        chardev = _Chardev(self.name, self.address)
        bus = f"target-{self.name}-bus"
        port = {
            "driver": "virtserialport",
            "id": f"target-{self.name}",
            "bus": f"{bus}.0",
            "nr": 1,
            "chardev": chardev.id,
            "name": self.name,
        }
        options = ",".join(f"{key}={value}" for key, value in port.items() if key != "driver")
        device = (
            *("-device", f"virtio-serial-pci,id={bus},max_ports=2"),
            *("-device", f"virtserialport,{options}"),
        )
        return QemuDevice(
            name=self.name,
            arguments=(*chardev.arguments, *device),
            stand_in=(*chardev.nowhere, *device),
            # The device cannot change its chardev. A new port reads nothing before the guest opens
            # it, and the state that is loaded then is that of a port with the same number.
            on_reset=(
                ("device_del", {"id": port["id"]}),
                ("chardev-remove", {"id": chardev.id}),
                ("chardev-add", {"id": chardev.id, "backend": chardev.backend}),
                ("device_add", port),
            ),
            guest_modules=("virtio_console",),
            guest_setup=_link(
                self.name,
                "for port in /sys/class/virtio-ports/*; do "
                f'  [ "$(cat "$port/name" 2>/dev/null)" != {self.name} ] || '
                "  echo /dev/${port##*/}; "
                "done",
            ),
        )


@dataclass(frozen=True)
class BlockDevice:
    """A virtio disk (Linux' driver virtio_blk) whose sectors an NBD server on the host serves.

    Attributes:
        name: the guest's disk is ``/dev/target/NAME``, a link to ``/dev/vd…``.
        address: where the target is: the path of a Unix socket on which it listens, or a TCP port
            of 127.0.0.1.
        size: bytes of the disk, a multiple of 512; the export must have as many.
        export: the name of the export.
        read_only: whether the guest can only read it.
    """

    name: str
    address: Path | int
    size: int
    export: str = ""
    read_only: bool = False

    def as_qemu(self) -> QemuDevice:
        """See :class:`Device`."""
        if self.size <= 0 or self.size % 512:
            raise TargetError(
                f"the disk {self.name!r} cannot have {self.size} bytes",
                hint="the size is a multiple of 512",
            )
        node = f"target-{check_device_name(self.name)}"
        server, nowhere = f"{node}-server", f"{node}-nowhere"
        null = {"driver": "null-co", "node-name": nowhere, "size": self.size, "read-zeroes": True}
        disk = {"driver": "raw", "node-name": node, "read-only": self.read_only}
        nbd = {
            "driver": "nbd",
            "node-name": server,
            "server": _socket_address(self.name, self.address),
            "export": self.export,
            "read-only": self.read_only,
        }
        return QemuDevice(
            name=self.name,
            # The disk leads nowhere where it is not connected: in the machine of the snapshot, and
            # at a reset, when the target may serve elsewhere from then on.
            arguments=(
                *("-blockdev", json.dumps(null)),
                *("-blockdev", json.dumps({**disk, "file": nowhere})),
                *("-device", f"virtio-blk-pci,id={node}-disk,drive={node},serial={self.name}"),
            ),
            on_start=(
                ("blockdev-add", nbd),
                ("blockdev-reopen", {"options": [{**disk, "file": server}]}),
            ),
            on_reset=(
                ("blockdev-reopen", {"options": [{**disk, "file": nowhere}]}),
                ("blockdev-del", {"node-name": server}),
            ),
            guest_modules=("virtio_blk",),
            guest_setup=_link(
                self.name,
                "for disk in /sys/block/vd*; do "
                f'  [ "$(cat "$disk/serial" 2>/dev/null)" != {self.name} ] || '
                "  echo /dev/${disk##*/}; "
                "done",
            ),
        )


@dataclass(frozen=True)
class VhostUserFs:
    """A virtio file system (Linux' driver virtiofs) whose requests a vhost-user back end serves.

    The back end maps the guest's memory. QEMU cannot save the device, so each guest boots.

    Attributes:
        name: the tag: ``mount -t virtiofs NAME DIRECTORY``. It has no link in ``/dev/target``.
        address: the path of the Unix socket on which the back end listens.
    """

    name: str
    address: Path

    def as_qemu(self) -> QemuDevice:
        """See :class:`Device`."""
        chardev = _socket_chardev(self.name, self.address)
        return QemuDevice(
            name=self.name,
            arguments=(
                *chardev.arguments,
                "-device",
                f"vhost-user-fs-pci,id=target-{self.name},chardev={chardev.id},tag={self.name}",
            ),
            guest_modules=("virtiofs",),
            can_be_saved=False,
            shared_memory=True,
            back_end=str(self.address),
        )


@dataclass(frozen=True)
class Tpm:
    """A TPM behind a TIS interface (Linux' driver tpm_tis), emulated by the target.

    The target speaks the protocol of swtpm's control channel (QEMU's
    ``docs/specs/tpm.rst``, "the QEMU TPM emulator device"). The TPM has state that QEMU would ask
    for in a snapshot, so each guest boots. It boots without ACPI: for a TPM, QEMU's firmware puts
    the ACPI tables where QEMU then loads the initramfs (seen with 7.2), so Linux is told to look at
    the address of the interface.

    Attributes:
        name: the guest's TPM is ``/dev/target/NAME``, a link to ``/dev/tpm…``.
        address: the path of the Unix socket on which the target takes control commands.
    """

    name: str
    address: Path

    def as_qemu(self) -> QemuDevice:
        """See :class:`Device`."""
        chardev = _socket_chardev(self.name, self.address)
        return QemuDevice(
            name=self.name,
            arguments=(
                *chardev.arguments,
                *("-tpmdev", f"emulator,id=target-{self.name},chardev={chardev.id}"),
                *("-device", f"tpm-tis,tpmdev=target-{self.name}"),
            ),
            kernel_arguments=("acpi=off", "tpm_tis.force=1"),
            guest_setup=_link(
                self.name, 'for tpm in /sys/class/tpm/tpm*; do echo "/dev/${tpm##*/}"; break; done'
            ),
            can_be_saved=False,
        )


def check_device_name(name: object) -> str:
    """Return a name that QEMU, the guest and a file system take.

    Raises:
        TargetError: it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TargetError(
            f"a device cannot have the name {name!r}",
            hint="a letter, then at most 19 letters, digits, - and _",
        )
    return name


_NOWHERE = {"type": "null", "data": {}}
"""The back end of a chardev that is always open and leads nowhere."""


class _Chardev:
    """QEMU's connection to an address: as options, as a back end of QMP, and as a stand-in."""

    def __init__(self, name: str, address: Path | int) -> None:
        self.id = f"target-{check_device_name(name)}-link"
        # A terminal has its own back end, which passes on speed and control lines.
        if not isinstance(address, int) and _is_terminal(name, address):
            options = f"serial,id={self.id},path={_escaped(address)}"
            backend: dict[str, Any] = {"type": "serial", "data": {"device": str(address)}}
        else:
            target = _socket_address(name, address)
            if target["type"] == "unix":
                options = f"socket,id={self.id},path={_escaped(target['path'])}"
                data = {"type": "unix", "data": {"path": target["path"]}}
            else:
                host, port = target["host"], target["port"]
                options = f"socket,id={self.id},host={host},port={port},nodelay=on"
                data = {"type": "inet", "data": {"host": host, "port": port}}
            connection = {"addr": data, "server": False, "nodelay": data["type"] == "inet"}
            backend = {"type": "socket", "data": connection}
        self.backend = backend
        self.arguments = ("-chardev", options)
        self.nowhere = ("-chardev", f"null,id={self.id}")


def _socket_chardev(name: str, address: Path) -> _Chardev:
    """Return the connection to a Unix socket, over which descriptors are passed.

    Raises:
        TargetError: the address is something else.
    """
    if isinstance(address, int) or _is_terminal(name, address):
        raise TargetError(
            f"the device {name!r} is to be at {address}, which is no Unix socket",
            hint="the target must listen there: socket.AF_UNIX, SOCK_STREAM",
        )
    return _Chardev(name, address)


def _is_terminal(name: str, address: Path) -> bool:
    return isinstance(address, Path) and stat.S_ISCHR(_mode(name, address))


def _mode(name: str, address: Path) -> int:
    try:
        return Path(address).stat().st_mode
    except (OSError, ValueError) as error:
        raise TargetError(
            f"the device {name!r} is to be at {address}, which cannot be used: {error}",
            hint="start() makes the socket and listens on it before it returns",
        ) from error


def _socket_address(name: str, address: Path | int) -> dict[str, str]:
    """Return an address as QEMU's ``SocketAddress``."""
    if isinstance(address, int) and not isinstance(address, bool):
        if not 1 <= address <= 65535:
            raise TargetError(
                f"the device {name!r} is to be at port {address}",
                hint="a port is a number from 1 to 65535",
            )
        return {"type": "inet", "host": "127.0.0.1", "port": str(address)}
    if not isinstance(address, Path):
        raise TargetError(
            f"the device {name!r} is to be at {address!r}",
            hint="it must be a pathlib.Path of a Unix socket, or a TCP port, an int",
        )
    if not stat.S_ISSOCK(_mode(name, address)):
        raise TargetError(
            f"the device {name!r} is to be at {address}, which is no socket",
            hint="the target must listen there: socket.AF_UNIX, SOCK_STREAM",
        )
    # The target may change the working directory, and QEMU has its own.
    return {"type": "unix", "path": str(address.absolute())}


def _link(name: str, find: str) -> str:
    """Return a script that makes the guest's name of a device.

    Args:
        find: shell commands that print the device's node, or nothing while there is none.
    """
    link = shlex.quote(f"{DEVICE_DIRECTORY}/{check_device_name(name)}")
    return (
        f"mkdir -p {DEVICE_DIRECTORY}\n"
        "steps=0\n"
        f'while node=$({find}); [ -z "$node" ] || [ ! -e "$node" ]; do\n'
        f"  steps=$((steps + 1))\n"
        f"  if [ $steps -gt {_SETTLE_STEPS} ]; then\n"
        f"    echo 'no driver of the guest has found the device {name}' >&2\n"
        "    exit 1\n"
        "  fi\n"
        "  sleep 0.05\n"
        "done\n"
        f'ln -sfn "$node" {link}\n'
    )


def _escaped(value: str | Path) -> str:
    """Escape a value inside one of QEMU's comma-separated options."""
    return str(value).replace(",", ",,")
