# SPDX-License-Identifier: Apache-2.0
"""USB devices of the package usbip as targets."""

from __future__ import annotations

from typing import Any

from bridge.targets.usbip import UsbTarget
from tests.support.modules import NETWORK_MODULES

BLOCK = 512
BLOCKS = 4096


class Memory:
    """The medium of a disk, as the package's class for mass storage takes it."""

    block_size = BLOCK
    num_blocks = BLOCKS

    def __init__(self) -> None:
        self._bytes = bytearray(BLOCK * BLOCKS)

    def read(self, lba: int, count: int) -> bytes:
        return bytes(self._bytes[lba * BLOCK : (lba + count) * BLOCK])

    def write(self, lba: int, count: int, data: bytes) -> None:
        self._bytes[lba * BLOCK : (lba + count) * BLOCK] = data


class UsbDisk(UsbTarget):
    """A USB stick."""

    guest_modules = NETWORK_MODULES
    ready = "/dev/sda"

    def device(self) -> Any:
        from usbip import USBDevice
        from usbip.classes.device.msc import MSC
        from usbip.core import SPEED_HIGH

        device = USBDevice(0x1209, 0x0002, product="Stick", serial="0001")
        device.set_speed(SPEED_HIGH)
        device.add(MSC(Memory()))
        return device

    @property
    def guest_setup(self) -> str:
        # The driver waits a second for a stick to settle.
        return "echo 0 >/sys/module/usb_storage/parameters/delay_use\n" + super().guest_setup


class UsbKeyboard(UsbTarget):
    """A keyboard, whose keys :meth:`press` presses."""

    guest_modules = NETWORK_MODULES
    ready = "/dev/hidraw0"

    def device(self) -> Any:
        from usbip import USBDevice
        from usbip.classes.device.hid import HID, PROTOCOL_KEYBOARD, SUBCLASS_BOOT
        from usbip.classes.device.hid import keyboard_report_descriptor as descriptor

        self.keys = HID(descriptor(), subclass=SUBCLASS_BOOT, protocol=PROTOCOL_KEYBOARD)
        device = USBDevice(0x1209, 0x0003, product="Keyboard")
        device.add(self.keys)
        return device

    def press(self, usage: int) -> None:
        """Press and release a key, by its usage id."""
        self.keys.send_report(bytes([0, 0, usage, 0, 0, 0, 0, 0]))
        self.keys.send_report(bytes(8))
