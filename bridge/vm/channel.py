# SPDX-License-Identifier: Apache-2.0
"""The port over which the guest's agent runs commands: frames, and the host's end.

``guest/agent/channel.h`` describes the protocol and has the same numbers. The guest is not trusted:
a frame that makes no sense ends the channel, and its sizes are bounded before they are used.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "COMMANDS",
    "PAYLOAD_LIMIT",
    "PORT_NAME",
    "SEED_BYTES",
    "SPEC_LIMIT",
    "STDIN_WINDOW",
    "VERSION",
    "Action",
    "BrokenChannel",
    "ChannelPort",
    "Frame",
    "Kind",
    "Restarted",
]

PORT_NAME = "kcov-bridge.agent"
VERSION = 1
PAYLOAD_LIMIT = 32768 - 16
COMMANDS = 64
"""How many commands run at once."""
STDIN_WINDOW = 65536
"""Bytes of a command's stdin that may be on their way."""
SPEC_LIMIT = 4 << 20
SEED_BYTES = 32
NOT_BEGUN = 256
"""The exit status of a command that the start-up files of the shell did not let begin."""

_MAGIC = 0x6F63766B
_HEADER = struct.Struct("<IIII")
_HELLO = struct.Struct("<IIqq")
_READ_SIZE = 256 * 1024
_FOREVER_MS = 1 << 30


class Kind(enum.IntEnum):
    """What a frame means."""

    HELLO = 1
    SPEC = 2
    START = 3
    STDIN = 4
    STDIN_END = 5
    CREDIT = 6
    SIGNAL = 7
    CLOSE = 8
    PING = 9

    READY = 32
    STDOUT = 33
    STDERR = 34
    EXIT = 35
    COMPLETE = 36
    END = 37
    TAKEN = 38
    PONG = 39
    FAILED = 40
    BROKEN = 41


class Action(enum.IntEnum):
    """What a command is."""

    EXECUTE = 1
    PUT = 2
    GET = 3
    LOOK = 4


_FROM_GUEST = {int(kind): kind for kind in Kind if kind >= Kind.READY}
_SIZES = {
    Kind.EXIT: 4,
    Kind.COMPLETE: 0,
    Kind.END: 0,
    Kind.TAKEN: 4,
    Kind.PONG: 0,
    Kind.FAILED: 4,
    Kind.BROKEN: 0,
}


class Frame(NamedTuple):
    """A frame of the guest."""

    kind: Kind
    command: int
    payload: bytes

    @property
    def number(self) -> int:
        """The number that is the payload."""
        return int.from_bytes(self.payload, "little")


class BrokenChannel(Exception):
    """The guest sent something that is no frame; or lost track of ours."""


class Restarted(Exception):
    """The session has ended, because the guest is reset."""


class ChannelPort:
    """The host's end of the port, and its sessions.

    Any thread may call any method. Nothing here waits but :meth:`wait`.

    Args:
        sock: our end.
        far_end: QEMU's end, from which frames that QEMU has not read are taken back.
    """

    def __init__(self, sock: socket.socket, far_end: socket.socket) -> None:
        self._stack = contextlib.ExitStack()
        self._sock = self._stack.enter_context(sock)
        self._far_end = self._stack.enter_context(far_end)
        for each in (sock, far_end):
            each.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stack.callback(os.close, self._wake)
        self._lock = threading.Lock()  # guards all below
        self._session = 1
        self._broken = ""
        self._closed = False
        self._outgoing = bytearray()
        self._incoming = bytearray()

    @property
    def session(self) -> int:
        """The number of the current session."""
        with self._lock:
            return self._session

    def restart(self) -> None:
        """End the session. What QEMU has not read yet is taken back, so that it never arrives.

        Then only :meth:`hello` sends anything.
        """
        with self._lock:
            self._session = self._session + 1 & 0xFFFFFFFF or 1
            self._broken = ""
            self._outgoing.clear()
            _drain(self._far_end)
        self.wake()

    def hello(self, *, set_clock: bool) -> None:
        """Begin the session. What the guest sent before is discarded, so it must stand still."""
        seconds, rest = divmod(time.time_ns(), 10**9)
        payload = _HELLO.pack(VERSION, set_clock, seconds, rest) + os.urandom(SEED_BYTES)
        with self._lock:
            _drain(self._sock)
            self._incoming.clear()
            header = _HEADER.pack(len(payload), self._session, _MAGIC, Kind.HELLO)
            self._outgoing += header + payload
            self._flush()

    def send(self, session: int, command: int, frames: Iterable[tuple[Kind, bytes]]) -> None:
        """Send frames of a command, or of none (0).

        Raises:
            Restarted: the session is over.
            BrokenChannel: the channel is broken.
        """
        with self._lock:
            self._require(session)
            for kind, payload in frames:
                self._outgoing += _HEADER.pack(len(payload), session, command, kind)
                self._outgoing += payload
            self._flush()
            waiting = bool(self._outgoing)
        if waiting:
            # Who waits now does not know that there is something to write.
            self.wake()

    def receive(self, session: int) -> list[Frame]:
        """Return what the guest has sent.

        Raises:
            Restarted: the session is over.
            BrokenChannel: the channel is broken.
        """
        with self._lock:
            self._require(session)
            self._flush()
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                self._incoming += self._sock.recv(_READ_SIZE)
            try:
                return self._frames()
            except BrokenChannel as error:
                self._broken = str(error)
                raise

    def wait(self, timeout: float | None) -> bool:
        """Wait until there is something to receive, or :meth:`wake` was called; False if not."""
        poll = select.poll()
        with self._lock:
            poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        poll.register(self._wake, select.POLLIN)
        ready = dict(poll.poll(_FOREVER_MS if timeout is None else max(0.0, timeout) * 1000))
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        return bool(ready)

    def wake(self) -> None:
        """Have :meth:`wait` return. Does nothing after :meth:`close`."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close the port, which nobody may use any more. Safe to call twice."""
        with self._lock:
            self._closed = True
        self._stack.close()

    # With the lock held

    def _require(self, session: int) -> None:
        if session != self._session:
            raise Restarted
        if self._broken:
            raise BrokenChannel(self._broken)

    def _flush(self) -> None:
        """Write as much as QEMU takes; the rest goes with the next call."""
        # The machine's process tells of QEMU's end.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._outgoing:
                sent = self._sock.send(self._outgoing)
                del self._outgoing[:sent]

    def _frames(self) -> list[Frame]:
        frames: list[Frame] = []
        data, at = self._incoming, 0
        while len(data) - at >= _HEADER.size:
            size, session, command, number = _HEADER.unpack_from(data, at)
            kind = _FROM_GUEST.get(number)
            if kind is None or size > PAYLOAD_LIMIT or size != _SIZES.get(kind, size):
                raise BrokenChannel(f"a frame of kind {number} with {size} bytes")
            end = at + _HEADER.size + size
            if end > len(data):
                break
            if session == self._session:
                frames.append(Frame(kind, command, bytes(data[at + _HEADER.size : end])))
                if kind is Kind.BROKEN:
                    raise BrokenChannel("the guest lost track of the host's frames")
            at = end
        del data[:at]
        return frames


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        while sock.recv(_READ_SIZE):
            pass
