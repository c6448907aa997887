# SPDX-License-Identifier: Apache-2.0
"""The process for wires, with a real region and a real service; the test is the guest."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bridge.device.abi import (
    PAGE_SIZE,
    WIRE_BYTES,
    WIRE_RING_BYTES,
    WORD,
    HeaderWord,
    WireEnd,
    WireWord,
)
from bridge.device.region import Area, Region
from bridge.targets import Endpoint
from bridge.vm.wires import WireRelay

PORT = 564
SECONDS = 30.0


@dataclass
class Wire:
    """What a guest does with one connection."""

    region: Region
    area: Area
    bell: int
    service: socket.socket

    def write(self, data: bytes) -> None:
        start = self.area.offset + PAGE_SIZE
        self.region._bytes[start : start + len(data)] = data
        self.area.words[WireWord.GUEST_SENT] = len(data)
        os.eventfd_write(self.bell, 1)

    def wait(self, word: WireWord, value: int) -> None:
        deadline = time.monotonic() + SECONDS
        while self.area.words[word] != value:
            assert time.monotonic() < deadline, f"{word.name} stays {self.area.words[word]}"
            time.sleep(0.001)

    def read(self, size: int) -> bytes:
        self.wait(WireWord.HOST_SENT, size)
        start = self.area.offset + PAGE_SIZE + WIRE_RING_BYTES
        return bytes(self.region._bytes[start : start + size])


@dataclass
class Guest:
    region: Region
    relay: WireRelay
    bell: int
    guest_bell: int
    listener: socket.socket

    def connect(self) -> Wire:
        area = self.region.allocate(WIRE_BYTES // WORD)
        assert area is not None
        assert self.relay.open(PORT, area.offset) == 0
        service, _ = self.listener.accept()
        service.settimeout(SECONDS)
        return Wire(self.region, area, self.bell, service)


@pytest.fixture
def guest() -> Iterator[Guest]:
    region = Region(4 << 20)
    bell, guest_bell = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint("echo", listener.getsockname()[1], PORT)
        relay = WireRelay(region, bell, guest_bell, [endpoint])
        try:
            yield Guest(region, relay, bell, guest_bell, listener)
        finally:
            relay.close()
            region.close()
            os.close(bell)
            os.close(guest_bell)


def test_wires_both_directions_bytes_arrive_after_the_epoch_changed(guest: Guest) -> None:
    wire = guest.connect()
    before = guest.region.control[HeaderWord.COVERAGE_EPOCH]
    wire.write(b"question")
    assert wire.service.recv(100) == b"question"
    wire.service.sendall(b"answer")
    assert wire.read(6) == b"answer"
    assert guest.region.control[HeaderWord.COVERAGE_EPOCH] != before
    # The guest does not poll, so it is interrupted.
    assert select.select([guest.guest_bell], [], [], SECONDS)[0]


def test_wires_without_an_epoch_leave_it_alone(guest: Guest) -> None:
    endpoint = Endpoint("echo", guest.listener.getsockname()[1], PORT)
    relay = WireRelay(guest.region, guest.bell, guest.guest_bell, [endpoint], changes_epoch=False)
    try:
        wire = replace(guest, relay=relay).connect()
        wire.service.sendall(b"answer")
        assert wire.read(6) == b"answer"
        assert guest.region.control[HeaderWord.COVERAGE_EPOCH] == 0, "each return is reported"
    finally:
        relay.close()


def test_wires_closed_with_unsent_bytes_service_gets_them_and_the_end(guest: Guest) -> None:
    wire = guest.connect()
    wire.write(b"x" * WIRE_RING_BYTES)
    assert guest.relay.end(wire.area.offset) == 0
    guest.region.free(wire.area)
    got = b""
    while part := wire.service.recv(1 << 20):
        got += part
    assert got == b"x" * WIRE_RING_BYTES


def test_wires_service_closes_guest_finds_the_end_after_the_data(guest: Guest) -> None:
    wire = guest.connect()
    wire.service.sendall(b"last")
    wire.service.close()
    wire.wait(WireWord.HOST_ENDED, WireEnd.CLOSED)
    assert wire.read(4) == b"last"


@pytest.mark.parametrize("word", [WireWord.GUEST_SENT, WireWord.GUEST_TAKEN])
def test_wires_impossible_position_resets_that_connection_alone(
    guest: Guest, word: WireWord
) -> None:
    good, bad = guest.connect(), guest.connect()
    bad.area.words[word] = 1 << 63
    os.eventfd_write(guest.bell, 1)
    bad.wait(WireWord.HOST_ENDED, WireEnd.RESET)
    with pytest.raises(ConnectionResetError):
        bad.service.recv(1)
    good.write(b"still")
    assert good.service.recv(100) == b"still"


def test_wires_reset_resets_every_connection_and_new_ones_work(guest: Guest) -> None:
    wire = guest.connect()
    guest.relay.reset()
    with pytest.raises(ConnectionResetError):
        wire.service.recv(1)
    again = guest.connect()
    again.write(b"new")
    assert again.service.recv(100) == b"new"


def test_wires_full_ring_goes_on_when_the_guest_has_read(guest: Guest) -> None:
    wire = guest.connect()
    wire.service.setblocking(False)
    sent = 0
    deadline = time.monotonic() + SECONDS
    while wire.area.words[WireWord.HOST_FULL] == 0 and time.monotonic() < deadline:
        try:
            sent += wire.service.send(bytes(65536))
        except BlockingIOError:
            time.sleep(0.001)
    assert wire.area.words[WireWord.HOST_SENT] == WIRE_RING_BYTES
    wire.area.words[WireWord.GUEST_TAKEN] = 1000
    os.eventfd_write(guest.bell, 1)
    wire.wait(WireWord.HOST_SENT, WIRE_RING_BYTES + 1000)


def test_wires_unknown_port_is_refused(guest: Guest) -> None:
    assert guest.relay.open(1, 0) == errno.ECONNREFUSED


def test_process_that_does_not_answer_is_ended(guest: Guest) -> None:
    """Later it would write into memory that is something else then."""
    os.kill(guest.relay.pid, signal.SIGSTOP)
    assert guest.relay.open(PORT, 0) == errno.EIO
    deadline = time.monotonic() + SECONDS
    while Path(f"/proc/{guest.relay.pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert guest.relay.end(0) == errno.EIO
