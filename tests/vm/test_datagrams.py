# SPDX-License-Identifier: Apache-2.0
"""The relay for UDP: the real process, with frames as QEMU sends them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError
from bridge.targets import TARGET_ADDRESS, UdpEndpoint
from bridge.vm import datagrams
from bridge.vm.datagram_relay import DatagramRelay
from bridge.vm.network import GUEST_ADDRESS, EpochWord
from tests.support.examples import examples

TARGET, GUEST = socket.inet_aton(TARGET_ADDRESS), socket.inet_aton(GUEST_ADDRESS)
HARDWARE = b"\x52\x54\x00\x12\x34\x56"
SERVICE = 53
RANDOM = random.Random(7)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Guest:
    """QEMU's side of the relay: takes and gives frames."""

    def __init__(self, relay: DatagramRelay) -> None:
        self.relay = relay
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(relay.directory / "qemu"))
        self.sock.settimeout(10)
        # With a time-out of its own a full queue would be polled, and always look writable.
        self.sending = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.number = 0

    def close(self) -> None:
        self.sock.close()
        self.sending.close()

    def send_frame(self, frame: bytes) -> None:
        self.sending.sendto(frame, str(self.relay.directory / "relay"))

    def send(self, data: bytes, port: int = 4000, to: int = SERVICE) -> None:
        """Send a datagram, in fragments if need be."""
        self.number += 1
        whole = struct.pack("!HHHH", port, to, 8 + len(data), 0) + data
        for at in range(0, len(whole), datagrams.PART):
            piece = whole[at : at + datagrams.PART]
            flags = at // 8 | (0x2000 if at + datagrams.PART < len(whole) else 0)
            self.send_frame(frame(packet(piece, number=self.number, flags=flags)))

    def receive(self) -> tuple[int, bytes]:
        """Return the protocol and the data of the next packet, put together."""
        whole = b""
        while True:
            got = self.sock.recv(4096)
            assert got[:6] == HARDWARE
            assert datagrams.checksum(got[14:34]) == 0
            length, flags = struct.unpack_from("!H2xH", got, 16)
            whole += got[34 : 14 + length]
            if not flags & 0x2000:
                return got[23], whole


def frame(data: bytes, kind: int = 0x0800) -> bytes:
    return b"\x52\x55" + TARGET + HARDWARE + struct.pack("!H", kind) + data


def packet(data: bytes, *, number: int = 1, flags: int = 0, protocol: int = 17) -> bytes:
    fields = (0x45, 0, 20 + len(data), number, flags, 64, protocol, 0, GUEST, TARGET)
    return struct.pack("!BBHHHBBH4s4s", *fields) + data


@pytest.fixture
def service() -> Iterator[int]:
    """The port of a service that answers in capitals."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                data, sender = sock.recvfrom(1 << 16)
                if not data:
                    return
                sock.sendto(data.upper(), sender)

        thread = threading.Thread(target=serve)
        thread.start()
        yield sock.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", sock.getsockname())
        thread.join()


@pytest.fixture
def guest(service: int) -> Iterator[Guest]:
    with ExitStack() as stack:
        relay = DatagramRelay([UdpEndpoint("it", service, SERVICE)])
        stack.callback(relay.close)
        guest = Guest(relay)
        stack.callback(guest.close)
        yield guest


@pytest.mark.parametrize("size", [1, 1472, 1473, 5000, 60_000])
def test_datagram_and_answer_of_any_size(guest: Guest, size: int) -> None:
    guest.send(b"a" * size)
    protocol, answer = guest.receive()
    assert protocol == 17
    assert struct.unpack("!HHHH", answer[:8]) == (SERVICE, 4000, 8 + size, 0)
    assert answer[8:] == b"A" * size


def test_answer_changes_the_epoch_before_the_guest_has_it(service: int, tmp_path: Path) -> None:
    file = tmp_path / "region"
    file.write_bytes(bytes(8192))
    relay = DatagramRelay([UdpEndpoint("it", service, SERVICE)], EpochWord(str(file), 4096 + 256))
    with ExitStack() as stack:
        stack.callback(relay.close)
        guest = Guest(relay)
        stack.callback(guest.close)
        seen = {0}
        for _ in range(20):
            guest.send(b"a")
            guest.receive()
            value = int.from_bytes(file.read_bytes()[4096 + 256 :][:8], "little")
            assert value not in seen
            seen.add(value)


def test_port_that_nobody_serves_is_refused(guest: Guest) -> None:
    guest.send(b"a", to=54)
    protocol, message = guest.receive()
    assert protocol == 1
    assert message[:2] == bytes([3, 3])
    assert datagrams.checksum(message) == 0
    # What was sent is in the message, as the guest's kernel needs it to find the socket.
    assert message[8:][12:20] == GUEST + TARGET
    assert struct.unpack_from("!HH", message, 28) == (4000, 54)


def test_arp_is_answered_for_the_targets_address_alone(guest: Guest) -> None:
    def ask(address: bytes) -> None:
        guest.send_frame(
            frame(
                struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, HARDWARE, GUEST, b"", address),
                0x0806,
            )
        )

    ask(socket.inet_aton("10.0.2.2"))
    ask(TARGET)
    answer = guest.sock.recv(4096)
    assert answer[22:32] == b"\x52\x55" + TARGET + TARGET


def test_hostile_frames_are_survived_and_bounded(guest: Guest) -> None:
    good = frame(packet(struct.pack("!HHHH", 4000, SERVICE, 9, 0) + b"x"))
    for _ in range(examples(2000)):
        bad = bytearray(good + RANDOM.randbytes(RANDOM.randrange(64)))
        for _ in range(RANDOM.randrange(1, 6)):
            bad[RANDOM.randrange(14, len(bad))] = RANDOM.randrange(256)
        guest.send_frame(bytes(bad[: RANDOM.randrange(1, len(bad))]))
    for number in range(examples(500)):
        # The rest of none of these comes.
        guest.send_frame(frame(packet(b"x" * 64, number=number, flags=0x2000)))
        guest.send(b"a", port=10_000 + number)
    guest.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            guest.sock.recv(4096)
    guest.sock.settimeout(10)
    guest.relay.reset()
    guest.send(b"fine")
    _, answer = guest.receive()
    while answer[8:] != b"FINE":
        _, answer = guest.receive()


def test_flows_the_relay_keeps_are_bounded(guest: Guest) -> None:
    for port in range(datagrams.FLOWS + 50):
        guest.send(b"a", port=1 + port)
        guest.receive()
    pid = guest.relay.pid
    assert len(os.listdir(f"/proc/{pid}/fd")) < datagrams.FLOWS + 20  # noqa: PTH208


def test_reset_drops_answers_on_the_way_and_takes_new_ports(guest: Guest, service: int) -> None:
    guest.relay.reset([UdpEndpoint("it", service, 99)])
    guest.send(b"a")
    assert guest.receive()[0] == 1
    guest.send(b"a", to=99)
    assert guest.receive()[1][8:] == b"A"


def test_reset_of_a_relay_that_died_is_an_error(guest: Guest) -> None:
    os.kill(guest.relay.pid, 9)

    def gone() -> bool:
        return not Path(f"/proc/{guest.relay.pid}/fd/0").exists()

    wait_until(gone)
    with pytest.raises(InfrastructureError, match="the UDP relay"):
        guest.relay.reset()
