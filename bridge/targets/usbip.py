# SPDX-License-Identifier: Apache-2.0
"""USB devices that a USB/IP server on the host serves, imported by the guest's own ``vhci_hcd``.

:class:`UsbDevice` works with any USB/IP server. :class:`UsbTarget` is a target whose device is
written in Python with the package ``usbip``.

``Documentation/usb/usbip_protocol.rst`` in Linux has the messages. The guest's kernel speaks the
protocol once it is given a connection on which a device was imported; :attr:`UsbDevice.guest_setup`
imports it. It needs no program but bash, coreutils and awk, which each image has.
"""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import MissingDependencyError, TargetError
from bridge.targets import TARGET_ADDRESS, Endpoint
from bridge.targets.connections import ConnectionServer

__all__ = ["MODULES", "PORT", "UsbDevice", "UsbTarget"]

PORT = 3240
"""The TCP port registered for USB/IP."""

MODULES = ("usbip_core", "vhci_hcd")
"""The guest's modules for any USB/IP device; the device's own driver comes besides."""

_BUS_ID = re.compile(r"[0-9]+-[0-9]+(\.[0-9]+)*")
_BUS_ID_BYTES = 32
_REPLY_BYTES = 320
_NUMBERS_OFFSET = 296
"""Where bus number, device number and speed lie in the reply: three big-endian words."""

_SCRIPT = r"""
set -eu
bus_id=$0 address=$1 port=$2 ready=$3
hub=/sys/devices/platform/vhci_hcd.0
exec 3<>"/dev/tcp/$address/$port"
# OP_REQ_IMPORT: version 1.1.1, code, status, bus id.
printf '\x01\x11\x80\x03\0\0\0\0' >&3
{ printf %s "$bus_id"; head -c @ID@ /dev/zero; } | head -c @ID@ >&3
reply=$(dd bs=@REPLY@ count=1 iflag=fullblock status=none <&3 | od -An -v -tx1 | tr -d ' \n')
if [ ${#reply} -ne $((2 * @REPLY@)) ] || [ "${reply:8:8}" != 00000000 ]; then
    echo "the USB/IP server does not give the device $bus_id: status 0x${reply:8:8}" >&2
    exit 1
fi
word() { echo $((16#${reply:$((2 * (@NUMBERS@ + 4 * $1))):8})); }
id=$((($(word 0) << 16) | $(word 1))) speed=$(word 2)
# The first free port for this speed: hub, port, status (4: free), ...; "ss" from speed 5 on.
kind=hs; [ "$speed" -lt 5 ] || kind=ss
rhport=$(awk -v kind=$kind '$1 == kind && $3 == 4 { print $2 + 0; exit }' "$hub/status")
if [ -z "$rhport" ]; then
    echo "all ports of the guest's vhci_hcd are taken" >&2
    exit 1
fi
echo "$rhport 3 $id $speed" >"$hub/attach"
for ((step = 0; step < @STEPS@; step++)); do
    # The kernel is done with the device when it has set a configuration and the driver is there.
    for configured in "$hub"/usb*/[0-9]*-[0-9]*/bConfigurationValue; do
        if [ -s "$configured" ] && { [ -z "$ready" ] || compgen -G "$ready" >/dev/null; }; then
            exit 0
        fi
    done
    sleep 0.05
done
echo "the guest has no ${ready:-configured device} after @SECONDS@ s" >&2
exit 1
"""

_SECONDS = 30
_STEPS = _SECONDS * 20


@dataclass(frozen=True)
class UsbDevice:
    """A device of a USB/IP server, as the guest imports it.

    Attributes:
        bus_id: the device's name on the server.
        guest_port: where the guest reaches the server, by an :class:`bridge.targets.Endpoint`.
        ready: a path in the guest, or a pattern of paths, that exists when the device's driver is
            ready, such as ``/dev/sda`` or ``/sys/class/hwmon/hwmon0``; empty to wait only until the
            kernel has configured the device.

    Raises:
        TargetError: the bus id is none.
    """

    bus_id: str = "1-1"
    guest_port: int = PORT
    ready: str = ""

    def __post_init__(self) -> None:
        if not _BUS_ID.fullmatch(self.bus_id) or len(self.bus_id) >= _BUS_ID_BYTES:
            raise TargetError(
                f"{self.bus_id!r} is not a bus id of USB", hint="it has the form 1-1 or 1-1.2"
            )

    @property
    def guest_setup(self) -> str:
        """The shell script that imports the device, for a target's ``guest_setup``."""
        script = _SCRIPT
        for name, value in (
            ("ID", _BUS_ID_BYTES),
            ("REPLY", _REPLY_BYTES),
            ("NUMBERS", _NUMBERS_OFFSET),
            ("STEPS", _STEPS),
            ("SECONDS", _SECONDS),
        ):
            script = script.replace(f"@{name}@", str(value))
        words = ("bash", "-c", script, self.bus_id, TARGET_ADDRESS, str(self.guest_port))
        return shlex.join((*words, self.ready)) + "\n"


class UsbTarget:
    """A target that is one USB device, written in Python with the package ``usbip`` of PyPI.

    A subclass defines :meth:`device`, and the members that differ::

        class Keyboard(UsbTarget):
            driver_modules = ("usbhid", "hid_generic")
            ready = "/dev/input/event*"

            def device(self):
                from usbip import USBDevice
                from usbip.classes.device.hid import Keyboard

                device = USBDevice(0x1209, 0x0001, product="Keyboard")
                device.add(Keyboard())
                return device

    What the device keeps is kept when the guest is reset; the guest imports the device anew.
    """

    name = "usb"
    packages: tuple[str, ...] = ("usbip",)
    driver_modules: tuple[str, ...] = ()
    """The guest's modules for the device itself."""
    ready = ""
    """As :attr:`UsbDevice.ready`."""
    guest_teardown = ""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.endpoints: tuple[Endpoint, ...] = ()
        self._server: ConnectionServer | None = None

    def device(self) -> Any:
        """Return the device, a ``usbip.USBDevice``, with its interfaces; called once."""
        raise NotImplementedError

    @property
    def guest_modules(self) -> tuple[str, ...]:
        """Those for USB/IP and those for the device."""
        return (*MODULES, *self.driver_modules)

    @property
    def guest_setup(self) -> str:
        """Import the device."""
        return UsbDevice(ready=self.ready).guest_setup

    def start(self) -> None:
        """Serve the device.

        Raises:
            MissingDependencyError: the package ``usbip`` is not installed.
        """
        try:
            protocol = importlib.import_module("usbip.protocol")
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "the Python package usbip is not installed", hint="pip install usbip"
            ) from error
        device = self.device()
        # What plug() of the package sets, for a server that listens by itself.
        device.busid, device.busnum, device.devnum = "1-1", 1, 2
        self._server = ConnectionServer(
            lambda connection: protocol.serve_connection(connection, [device]),
            f"target-{self.name}",
        )
        self.endpoints = (Endpoint("usbip", self._server.port, PORT),)

    def stop(self) -> None:
        """Unplug the device: cut all connections, close the port, join the threads."""
        server, self._server = self._server, None
        self.endpoints = ()
        if server is not None:
            server.close()
