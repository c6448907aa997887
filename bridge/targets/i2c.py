# SPDX-License-Identifier: Apache-2.0
"""Chips on an I²C bus, modelled in Python, behind the guest's own drivers.

The kernels of Debian lack the driver for virtio's I²C, so the bus hangs on USB: the guest imports
an adapter of the kind "i2c-tiny-usb" by USB/IP (:mod:`bridge.targets.usbip`), Linux'
``drivers/i2c/busses/i2c-tiny-usb.c`` makes a bus of it, and the drivers of the chips, or programs
that open ``/dev/target/i2c``, work on that. Each message of a transfer is one request to the
target.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from bridge.targets.devices import DEVICE_DIRECTORY
from bridge.targets.usbip import UsbTarget

__all__ = ["Chip", "I2cTarget", "NoAnswer"]

# FTDI's number, given to the project i2c-tiny-usb.
_VENDOR, _PRODUCT = 0x0403, 0xC631

# The commands and answers of i2c-tiny-usb.c.
_CMD_ECHO, _CMD_GET_FUNC, _CMD_SET_DELAY, _CMD_GET_STATUS, _CMD_I2C_IO = range(5)
_CMD_I2C_IO_LAST = _CMD_I2C_IO | 3
_STATUS_IDLE, _STATUS_ADDRESS_ACK, _STATUS_ADDRESS_NAK = range(3)

_I2C_FUNC = 0x0EFF0001
"""I2C_FUNC_I2C and I2C_FUNC_SMBUS_EMUL of ``linux/i2c.h``."""

_SYS = "/sys/bus/i2c/devices"
_ADAPTER = "/sys/bus/usb/drivers/i2c-tiny-usb/*:*/i2c-*"


class NoAnswer(Exception):
    """A chip does not acknowledge its address: a transfer in the guest fails with ENXIO."""


class Chip(Protocol):
    """A chip as a bus sees it. Both may raise :class:`NoAnswer`."""

    def write(self, data: bytes) -> None:
        """Take the bytes of a message; most chips take the first as the number of a register."""

    def read(self, length: int) -> bytes:
        """Return the bytes of a message; more are cut off, and those that lack are 0xff."""


class I2cTarget(UsbTarget):
    """A target that is an I²C bus with chips.

    A subclass defines :meth:`chips`, and says which of them a driver of the kernel takes::

        class Sensor(I2cTarget):
            packages = ("lm75",)
            drivers = {0x48: "lm75"}

            def chips(self):
                import lm75

                return {0x48: lm75.Lm75(celsius=21.5)}

    The guest finds the bus at ``/dev/target/i2c``, a link to ``/dev/i2c-…``.
    """

    name = "i2c"
    drivers: Mapping[int, str] = {}
    """By address: the name under which a driver knows the chip."""
    chip_modules: tuple[str, ...] | None = None
    """The guest's modules with these drivers; None if they have the names of the drivers."""
    ready = _ADAPTER

    def chips(self) -> Mapping[int, Chip]:
        """Return the chips, by address; called once by :meth:`start`."""
        raise NotImplementedError

    @property
    def guest_modules(self) -> tuple[str, ...]:
        """Those for the bus and those for the chips."""
        chips = self.chip_modules
        if chips is None:
            chips = tuple(dict.fromkeys(self.drivers.values()))
        return (*super().guest_modules, "i2c_dev", "i2c_tiny_usb", *chips)

    @property
    def guest_setup(self) -> str:
        """Import the adapter, and tell the kernel of the chips: a bus cannot be asked for them."""
        lines = [
            f"bus=$(basename {_ADAPTER})",
            f"mkdir -p {DEVICE_DIRECTORY}",
            f'ln -sfn "/dev/$bus" {DEVICE_DIRECTORY}/i2c',
        ]
        for address, driver in self.drivers.items():
            lines += [
                f'echo {driver} {address:#04x} >"{_SYS}/$bus/new_device"',
                f'if [ ! -e "{_SYS}/${{bus#i2c-}}-{address:04x}/driver" ]; then',
                f"    echo 'the driver of {driver} does not take the chip {address:#04x}' >&2",
                "    exit 1",
                "fi",
            ]
        return "set -e\n" + super().guest_setup + "\n".join(lines) + "\n"

    def device(self) -> Any:
        """Return the adapter."""
        usbip = importlib.import_module("usbip")
        device = usbip.USBDevice(_VENDOR, _PRODUCT, product="I2C bus of kcov-bridge")
        bus = _Bus(self.chips(), usbip.Stall)
        # A request names the chip where others name an interface.
        interface = usbip.Interface()
        interface.on_control = bus.on_control
        device.add(interface)
        return device


class _Bus:
    """The firmware of the adapter."""

    def __init__(self, chips: Mapping[int, Chip], stall: type[Exception]) -> None:
        self._chips = dict(chips)
        self._stall = stall
        self._status = _STATUS_IDLE

    def on_control(self, setup: Any, data: bytes = b"") -> bytes:
        request = setup.bRequest
        if request == _CMD_ECHO:
            return int(setup.wValue).to_bytes(2, "little")
        if request == _CMD_GET_FUNC:
            return _I2C_FUNC.to_bytes(4, "little")
        if request == _CMD_SET_DELAY:
            return b""
        if request == _CMD_GET_STATUS:
            return bytes([self._status])
        if not _CMD_I2C_IO <= request <= _CMD_I2C_IO_LAST:
            raise self._stall
        return self._message(setup.wIndex, setup.bmRequestType & 0x80, setup.wLength, data)

    def _message(self, address: int, reads: int, length: int, data: bytes) -> bytes:
        chip = self._chips.get(address)
        self._status = _STATUS_ADDRESS_ACK
        try:
            if chip is None:
                raise NoAnswer
            if not reads:
                chip.write(bytes(data[:length]))
                return b""
            answer = bytes(chip.read(length))
        except NoAnswer:
            self._status = _STATUS_ADDRESS_NAK
            answer = b""
        # A released bus is high.
        return answer[:length].ljust(length, b"\xff") if reads else b""
