# SPDX-License-Identifier: Apache-2.0
"""The host's side of targets that are devices and file servers, spoken to without a guest."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import can
import pytest
from usbip import core, protocol

from bridge.errors import MissingDependencyError, TargetError
from bridge.targets.can import CanBus, CanTarget
from bridge.targets.connections import ConnectionServer
from bridge.targets.i2c import Chip, I2cTarget, NoAnswer
from bridge.targets.nbd import NbdDisk, export_size
from bridge.targets.nbdkit import NbdkitTarget
from bridge.targets.scratch import ScratchDirectory
from bridge.targets.smb import SmbShare
from bridge.targets.usbip import UsbDevice

SECONDS = 10


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="kb-") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


# ---- connections


def test_connection_server_close_cuts_connections_and_joins_threads() -> None:
    before = threads()

    def serve(connection: socket.socket) -> None:
        connection.sendall(b"?")
        connection.recv(1)

    server = ConnectionServer(serve, "test-server")
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as client:
        assert client.recv(1) == b"?"
        server.close()
        assert client.recv(1) == b""
    assert threads() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), SECONDS)


def test_connection_server_connection_that_is_reset_is_no_fault() -> None:
    ended: list[BaseException | None] = []

    def serve(connection: socket.socket) -> None:
        try:
            while connection.recv(1):
                pass
        except ConnectionError as error:
            ended.append(error)
            raise

    server = ConnectionServer(serve, "test-server")
    client = socket.create_connection(("127.0.0.1", server.port), SECONDS)
    # Linger for no time: the end is a reset.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sendall(b"x")
    client.close()
    deadline = time.monotonic() + SECONDS
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    server.close()
    assert [type(each) for each in ended] == [ConnectionResetError]


# ---- NBD


def answering(answer: bytes) -> ConnectionServer:
    def serve(connection: socket.socket) -> None:
        connection.sendall(answer)
        connection.recv(100)

    return ConnectionServer(serve, "test-nbd")


GREETING = b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1", "greets with"),
        (GREETING, "does not serve the export 'disk'"),
        (GREETING[:5], "does not serve the export 'disk'"),
    ],
)
def test_export_size_of_another_server_is_an_error(
    answer: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.targets.nbd._SECONDS", 3.0)
    server = answering(answer)
    try:
        with pytest.raises(TargetError, match=message):
            export_size(server.port, "disk")
    finally:
        server.close()


def test_export_size_without_a_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="does not serve"):
        export_size(tmp_path / "nobody")


def test_nbd_disk_with_a_wrong_name_is_refused() -> None:
    with pytest.raises(TargetError, match="cannot have the name"):
        NbdDisk("a disk").as_qemu()


# ---- nbdkit


class Plugin(NbdkitTarget):
    def __init__(self, script: str, place: Path) -> None:
        super().__init__()
        self._path = place / "plugin.py"
        self._path.write_text(script)

    def plugin(self) -> Path:
        return self._path


MINIMAL = """
API_VERSION = 2
def open(readonly): return 1
def get_size(handle): return 4096
def pread(handle, buffer, offset, flags): buffer[:] = bytes(len(buffer))
"""


def test_nbdkit_start_names_the_size_of_the_plugin_and_stop_leaves_nothing(
    short: Path, tmp_path: Path
) -> None:
    before = threads()
    target = Plugin(MINIMAL, tmp_path)
    target.start()
    (disk,) = target.devices
    assert getattr(disk, "size", None) == 4096
    target.stop()
    target.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(target.pid, 0)
    assert threads() == before
    assert list(short.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (MINIMAL + "raise RuntimeError('no medium')", "no medium"),
        ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        ("def open(readonly): return 1", "get_size"),
        (MINIMAL.replace("return 4096", "raise RuntimeError('no size')"), "no size"),
    ],
)
def test_nbdkit_plugin_that_fails_is_an_error_with_what_it_said(
    script: str, said: str, short: Path, tmp_path: Path
) -> None:
    target = Plugin(script, tmp_path)
    with pytest.raises(TargetError) as raised:
        target.start()
    assert said in raised.value.evidence
    assert list(short.iterdir()) == []


def test_nbdkit_missing_is_an_error_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError) as raised:
        Plugin(MINIMAL, tmp_path).start()
    assert "nbdkit-plugin-python" in raised.value.hint


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nbdkit_that_is_killed_ends_a_thread_with_an_exception(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: raised.append(str(hook.exc_value)))
    target = Plugin(MINIMAL, tmp_path)
    target.start()
    os.kill(target.pid, signal.SIGKILL)
    deadline = time.monotonic() + SECONDS
    while not raised and time.monotonic() < deadline:
        time.sleep(0.01)
    target.stop()
    assert raised
    assert raised[0].startswith("nbdkit ended by itself, with status -9")


# ---- USB and I2C


class Eeprom:
    """Answers no address while it writes."""

    def __init__(self) -> None:
        self.pointer = 0
        self.content = bytearray(b"0123456789")
        self.busy = False

    def write(self, data: bytes) -> None:
        if self.busy:
            raise NoAnswer
        self.pointer = data[0]
        self.content[self.pointer : self.pointer + len(data) - 1] = data[1:]
        self.busy = len(data) > 1

    def read(self, length: int) -> bytes:
        return bytes(self.content[self.pointer : self.pointer + length])


class Bus(I2cTarget):
    def __init__(self, chip: Eeprom) -> None:
        super().__init__()
        self._chip = chip

    def chips(self) -> Mapping[int, Chip]:
        return {0x50: self._chip}


class Adapter:
    """The driver's side, as drivers/i2c/busses/i2c-tiny-usb.c in Linux."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        protocol.client_import(self.socket, b"1-1")
        self.number = 0

    def control(self, kind: int, request: int, index: int, data: bytes, length: int) -> Any:
        self.number += 1
        setup = struct.pack("<BBHHH", kind, request, 0, index, length)
        urb = core.Urb(
            seqnum=self.number,
            devid=0x10002,
            direction=core.IN if kind & 0x80 else core.OUT,
            ep=0,
            flags=0,
            length=length,
            interval=0,
            setup=setup,
            buffer=data,
        )
        return protocol.client_submit(self.socket, urb)

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.control(0xC1, 7, address, b"", length).buffer)

    def write(self, address: int, data: bytes) -> None:
        assert self.control(0x41, 7, address, data, len(data)).status == 0

    @property
    def status(self) -> int:
        return int(self.control(0xC1, 3, 0, b"", 1).buffer[0])


ACK, NAK = 1, 2


@pytest.fixture
def eeprom() -> Iterator[tuple[Eeprom, Adapter]]:
    chip = Eeprom()
    target = Bus(chip)
    target.start()
    try:
        with contextlib.closing((adapter := Adapter(target.endpoints[0].host_port)).socket):
            yield chip, adapter
    finally:
        target.stop()


def test_i2c_message_reaches_the_chip_and_an_answer_is_padded(
    eeprom: tuple[Eeprom, Adapter],
) -> None:
    _, adapter = eeprom
    adapter.write(0x50, b"\x07")
    assert adapter.status == ACK
    assert adapter.read(0x50, 5) == b"789\xff\xff", "a bus that nobody drives is high"


def test_i2c_address_that_does_not_answer_is_told(eeprom: tuple[Eeprom, Adapter]) -> None:
    _, adapter = eeprom
    assert adapter.read(0x51, 1) == b"\xff"
    assert adapter.status == NAK
    adapter.write(0x50, b"\x00AB")
    assert adapter.status == ACK
    adapter.write(0x50, b"\x00")
    assert adapter.status == NAK, "it is busy"


def test_i2c_unknown_request_is_stalled(eeprom: tuple[Eeprom, Adapter]) -> None:
    _, adapter = eeprom
    assert adapter.control(0xC1, 0x20, 0, b"", 1).status == -errno.EPIPE


def test_i2c_target_stop_joins_its_threads_and_closes_its_port() -> None:
    before = threads()
    target = Bus(Eeprom())
    target.start()
    port = target.endpoints[0].host_port
    with contextlib.closing(Adapter(port).socket):
        target.stop()
        target.stop()
    assert threads() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), SECONDS)


@pytest.mark.parametrize("bus_id", ["", "1", "1-1; reboot", "a-1", "1-" + "1." * 20 + "1"])
def test_usb_device_with_a_wrong_bus_id_is_refused(bus_id: str) -> None:
    with pytest.raises(TargetError, match="not a bus id"):
        UsbDevice(bus_id)


# ---- CAN


class Nodes(CanTarget):
    """Keeps the frames that come, and sends what it is told."""

    def connect(self, bus: CanBus) -> None:
        self.bus = bus
        self.frames: list[can.Message] = []
        self.notifier = can.Notifier(bus, [self.frames.append])

    def disconnect(self) -> None:
        self.notifier.stop()

    def wait_for(self, count: int) -> list[can.Message]:
        deadline = time.monotonic() + SECONDS
        while len(self.frames) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.frames


@pytest.fixture
def nodes(short: Path) -> Iterator[tuple[Nodes, Path]]:
    target = Nodes()
    target.start()
    (port,) = target.devices
    assert isinstance(port.address, Path)
    yield target, port.address
    target.stop()
    assert list(short.iterdir()) == []


def connected(address: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(SECONDS)
    client.connect(str(address))
    return client


def test_can_frames_of_each_kind_pass_both_ways(nodes: tuple[Nodes, Path]) -> None:
    target, address = nodes
    with connected(address) as guest:
        for piece in (b"t1232", b"0A0B\rT1234", b"56780\rr7FF3\rR000000012\r"):
            guest.sendall(piece)
        got = target.wait_for(4)
        assert [
            (each.arbitration_id, each.is_extended_id, each.is_remote_frame) for each in got
        ] == [
            (0x123, False, False),
            (0x12345678, True, False),
            (0x7FF, False, True),
            (0x1, True, True),
        ]
        assert bytes(got[0].data) == b"\x0a\x0b"
        for each in got:
            target.bus.send(each)
        received = b""
        while received.count(b"\r") < 4:
            received += guest.recv(100)
        assert received == b"t12320A0B\rT123456780\rr7FF3\rR000000012\r"


def test_can_what_is_no_frame_is_passed_over(nodes: tuple[Nodes, Path]) -> None:
    target, address = nodes
    with connected(address) as guest:
        guest.sendall(b"S6\rO\r\r\rtXYZ1AA\rt1239000000000000000000\rt12320A\rt1232\xff\xff\r")
        guest.sendall(b"A" * 100_000 + b"\rt0011FF\r")
        (frame,) = target.wait_for(1)
        assert (frame.arbitration_id, bytes(frame.data)) == (1, b"\xff")


def test_can_port_that_connects_again_takes_the_place_of_the_old_one(
    nodes: tuple[Nodes, Path],
) -> None:
    target, address = nodes
    with connected(address) as guest:
        guest.sendall(b"t0011AA\rt00")
        target.wait_for(1)
        with connected(address) as again:
            again.sendall(b"t0021BB\r")
            assert [each.arbitration_id for each in target.wait_for(2)] == [1, 2]
            target.bus.send(target.frames[0])
            assert again.recv(100) == b"t0011AA\r"
            assert guest.recv(100) == b""


def test_can_frame_without_a_guest_is_lost(nodes: tuple[Nodes, Path]) -> None:
    target, _ = nodes
    target.bus.send(can.Message(arbitration_id=1))


# ---- the rest


def test_smb_share_is_mounted_with_words_that_no_shell_changes() -> None:
    share = SmbShare("a share", user="a user", password="$HOME", mount_point="/mnt/a b")
    assert "'//10.0.2.100/a share'" in share.guest_setup
    assert "username=a user,password=$HOME,cache=none,actimeo=0'" in share.guest_setup
    assert "mkdir -p '/mnt/a b'" in share.guest_setup
    assert "umount '/mnt/a b'" in share.guest_teardown


def test_scratch_directory_is_shared_emptied_and_removed(short: Path) -> None:
    scratch = ScratchDirectory("test")
    place = scratch.make()
    assert scratch.make() == place
    (place / "socket").touch()
    (place / "tree").mkdir()
    (place / "tree" / "file").touch()
    (place / "link").symlink_to(place)
    assert scratch.empty() == place
    assert list(place.iterdir()) == []
    scratch.remove()
    scratch.remove()
    assert list(short.iterdir()) == []
