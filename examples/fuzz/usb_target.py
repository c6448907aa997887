# SPDX-License-Identifier: Apache-2.0
"""A USB device of five functions, as a target: ``--target usb_target:UsbComposite``.

The device models are those of the package usbip: a stick, a serial port, a keyboard, a firmware
loader and a media player. No driver of the guest is bound to them, so that the harness
``usb_requests.c`` may send them any request.
"""

from __future__ import annotations

from typing import Any

from bridge.targets.usbip import UsbTarget

BLOCK, BLOCKS = 512, 64


class _Medium:
    """The medium of the stick."""

    block_size = BLOCK
    num_blocks = BLOCKS

    def __init__(self) -> None:
        self._bytes = bytearray(BLOCK * BLOCKS)

    def read(self, lba: int, count: int) -> bytes:
        return bytes(self._bytes[lba * BLOCK : (lba + count) * BLOCK])

    def write(self, lba: int, count: int, data: bytes) -> None:
        self._bytes[lba * BLOCK : (lba + count) * BLOCK] = data


class _Firmware:
    """A place for firmware of 4 KiB."""

    name = "flash"
    i_string = 0

    def __init__(self) -> None:
        self._bytes = b""

    @property
    def length(self) -> int:
        return len(self._bytes)

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > 4096:
            raise IndexError(offset)
        self._bytes = self._bytes[:offset].ljust(offset, b"\xff") + data

    def read(self, offset: int, size: int) -> bytes:
        return self._bytes[offset : offset + size]

    def begin_download(self) -> None:
        self._bytes = b""

    def finish_download(self) -> None:
        pass


class _Files:
    """The files of the media player: a dictionary of paths; directories have no content."""

    read_only = False
    description = "music"

    def __init__(self) -> None:
        self._files: dict[str, bytes | None] = {"a.txt": b"hello", "d": None, "d/b.mp3": b"song"}

    def listdir(self, path: str) -> list[str]:
        inside = (each.rpartition("/") for each in self._files)
        return [name for directory, _, name in inside if directory == path]

    def _content(self, path: str) -> bytes | None:
        try:
            return self._files[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def stat(self, path: str) -> tuple[bool, int, int]:
        content = self._content(path)
        return content is None, len(content or b""), 1_700_000_000

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        content = self._content(path) or b""
        return content[offset:] if size is None else content[offset : offset + size]

    def write(self, path: str, data: bytes) -> None:
        self._files[path] = bytes(data)

    def mkdir(self, path: str) -> None:
        self._files[path] = None

    def remove(self, path: str) -> None:
        self._content(path)
        for each in [x for x in self._files if x == path or x.startswith(f"{path}/")]:
            del self._files[each]

    def rename(self, old: str, new: str) -> None:
        self._content(old)
        for each in [x for x in self._files if x == old or x.startswith(f"{old}/")]:
            self._files[new + each[len(old) :]] = self._files.pop(each)

    def truncate(self, path: str, size: int) -> None:
        size = min(size, 1 << 16)
        self._files[path] = (self._content(path) or b"")[:size].ljust(size, b"\0")

    def pwrite(self, path: str, offset: int, data: bytes) -> None:
        offset = min(offset, 1 << 16)
        before = (self._content(path) or b"").ljust(offset, b"\0")
        self._files[path] = before[:offset] + bytes(data) + before[offset + len(data) :]

    def disk_usage(self) -> tuple[int, int]:
        return 1 << 20, 1 << 19


class UsbComposite(UsbTarget):
    """All of them in one device."""

    def device(self) -> Any:
        from usbip import USBDevice
        from usbip.classes.device.cdc_acm import CDCACM
        from usbip.classes.device.dfu import DFU
        from usbip.classes.device.hid import HID, keyboard_report_descriptor
        from usbip.classes.device.msc import MSC
        from usbip.classes.device.mtp import MTP
        from usbip.core import SPEED_HIGH

        device = USBDevice(0x1209, 0x0004, product="Composite", serial="0001")
        device.set_speed(SPEED_HIGH)
        for function in (
            MSC([_Medium(), _Medium()]),
            CDCACM(),
            HID(keyboard_report_descriptor()),
            DFU([_Firmware()]),
            MTP(_Files()),
        ):
            device.add(function)
        return device
