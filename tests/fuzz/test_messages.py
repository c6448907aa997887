# SPDX-License-Identifier: Apache-2.0
"""What shim and slot say to each other."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import pytest

from bridge.fuzz import messages
from bridge.fuzz.board import VERSION
from bridge.fuzz.messages import (
    Hello,
    Message,
    MessageError,
    NewCells,
    ResetWanted,
    ShimFailed,
    SuspectCase,
    TimedOut,
    parse,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    slot, shim = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with slot, shim:
        yield slot, shim


@pytest.mark.parametrize(
    ("datagram", "message"),
    [
        (b"hello 1 4711", Hello(1, 4711)),
        (b"new 12", NewCells(12)),
        (b"suspect 12 134", SuspectCase(12, 134)),
        (b"suspect 12 none", SuspectCase(12, None)),
        (b"timeout 18446744073709551615", TimedOut(2**64 - 1)),
        (b"reset every", ResetWanted("every")),
        (b"failed the map is 3 cells", ShimFailed("the map is 3 cells")),
    ],
)
def test_parse_each_message_is_what_it_encodes(datagram: bytes, message: Message) -> None:
    assert parse(datagram) == message
    assert message.encode() == datagram


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"hello",
        b"hello 1",
        b"new",
        b"new -1",
        b"new 1_0",
        b"new 1 2",
        b"suspect 1",
        b"reset ",
        b"\xff",
        b"go",
        b"new \xd9\xa3",
    ],
)
def test_parse_anything_else_is_refused(datagram: bytes) -> None:
    with pytest.raises(MessageError):
        parse(datagram)


def test_receive_hello_of_another_version_is_refused(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    slot, shim = pair
    shim.send(Hello(VERSION + 1, 1).encode())
    with pytest.raises(MessageError, match="version"):
        messages.receive(slot)


def test_receive_end_of_shim_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    slot, shim = pair
    shim.send(b"new 1")
    shim.close()
    assert messages.receive(slot) == NewCells(1)
    assert messages.receive(slot) is None


@pytest.mark.parametrize("counts", [False, True])
def test_welcome_carries_its_descriptors(
    pair: tuple[socket.socket, socket.socket], counts: bool
) -> None:
    slot, shim = pair
    own = [os.memfd_create(name) for name in ("region", "board", *(["faults"] if counts else []))]
    for size, fd in enumerate(own):
        os.write(fd, b"x" * (size + 1))
    messages.send_welcome(slot, *own)
    data, ancillary, _, _ = shim.recvmsg(messages.MESSAGE_BYTES, socket.CMSG_SPACE(3 * 4))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    assert data == messages.WELCOME
    assert [os.fstat(fd).st_size for fd in fds] == list(range(1, len(own) + 1))
    for fd in (*own, *fds):
        os.close(fd)
