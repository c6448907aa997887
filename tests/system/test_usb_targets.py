# SPDX-License-Identifier: Apache-2.0
"""USB devices in Python, behind the real drivers of a guest: vhci_hcd and that of the device."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from bridge.session.session import Session
from tests.support import ROOT
from tests.support.named_calls import make_calls
from tests.system.usb_targets import UsbKeyboard

pytestmark = pytest.mark.vm

# For lm75_target.
sys.path.append(str(ROOT / "examples"))

DISK = {"target": "tests.system.usb_targets:UsbDisk", "source": "python"}
SENSOR = {"target": "lm75_target:Lm75Target", "source": "python"}
KEYBOARD = {"target": "tests.system.usb_targets:UsbKeyboard", "source": "python"}
HID = "usbip/classes/device/hid.py"
MSC = "usbip/classes/device/msc.py"


@pytest.mark.guest(**DISK)
def test_usb_disk_each_call_reaches_its_scsi_command(session: Session) -> None:
    opened, written, synced, read = make_calls(
        session, "open /dev/sda wd", "pwrite sector 512 1024", "fsync", "pread 512 1024"
    )
    assert not opened.error
    assert written.result == read.result == 512
    assert read.data.startswith(b"sector\0")
    assert f"{MSC}:MSC._recv_write" in written.functions
    assert f"{MSC}:MSC._recv_write" not in read.functions | synced.functions
    assert f"{MSC}:MSC._data_in" in read.functions
    assert "usbip/device.py:USBDevice.handle_urb" in read.functions & written.functions


@pytest.mark.guest(**DISK)
def test_usb_disk_after_a_reset_is_imported_anew_with_its_contents(session: Session) -> None:
    write = "printf kept | dd of=/dev/sda bs=512 seek=9 conv=sync,notrunc oflag=direct status=none"
    session.guest.run(write, check=True)
    session.reset()
    result = session.run("dd if=/dev/sda bs=512 skip=9 count=1 status=none | head -c 4")
    assert result.text == "kept"
    imports = session.run("dmesg | grep -c 'device found, idVendor=1209'").text
    assert imports.strip() == "1"


@pytest.mark.guest(**KEYBOARD)
def test_usb_keyboard_lamps_and_keys_are_calls_of_hidraw(session: Session) -> None:
    opened, written = make_calls(session, "open /dev/hidraw0 w", "write 0x0002")
    assert not opened.error
    assert written.result == 2
    # The driver waits for the keyboard: no interrupt endpoint takes the lamps.
    assert f"{HID}:HID._set_report" in written.functions
    (keyboard,) = session.target_objects
    assert isinstance(keyboard, UsbKeyboard)
    assert keyboard.keys.last_output == b"\x02", "Caps Lock"
    read = "head -c 16 /dev/hidraw0 | od -An -v -tx1 -w8"
    with ThreadPoolExecutor(1) as pool:
        typed = pool.submit(session.run, read, timeout=60)
        # Keys that are pressed before the file is open are lost.
        while not wait([typed], timeout=0.2).done:
            keyboard.press(4)
        assert typed.result().text.split("\n")[0] == " 00 00 04 00 00 00 00 00"


@pytest.mark.guest(**SENSOR)
def test_i2c_sensor_is_read_through_its_driver(session: Session) -> None:
    opened, read = make_calls(session, "open /sys/class/hwmon/hwmon0/temp1_input r", "read 32")
    assert read.data == b"21500\n"
    assert read.functions >= {"lm75.py:Lm75.write", "lm75.py:Lm75.read", "lm75.py:register"}
    assert not opened.functions


@pytest.mark.guest(**SENSOR)
def test_i2c_address_without_a_chip_does_not_answer(session: Session) -> None:
    _, taken, free, written, read = make_calls(
        session, "open /dev/target/i2c w", "i2c 0x48", "i2c 0x49", "write 0x00", "read 2"
    )
    assert taken.error == "EBUSY", "a driver has the chip"
    assert not free.error
    assert written.error == read.error == "ENXIO"
    assert not written.functions | read.functions
