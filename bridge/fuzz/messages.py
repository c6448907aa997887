# SPDX-License-Identifier: Apache-2.0
"""What a shim and its slot say to each other on a Unix SOCK_SEQPACKET socket.

Each message is a datagram of ASCII words. The shim connects, and says ``hello``; the slot answers
``welcome`` with descriptors (SCM_RIGHTS): the region, the board, and, where the target has a
process of its own, the memory whose first word counts its faults. From then on only the shim
begins. It waits for ``go`` after each message, and meanwhile touches nothing of the lane: the slot
reads the case and its PCs from there, executes cases of its own (and writes ``last_case`` on the
board), or resets the guest, before it answers. If it had to start another machine, whose region is
another one with the same layout, it answers ``welcome`` in place of ``go``.

==================== ============================================================================
shim → slot          meaning
==================== ============================================================================
hello VERSION PID    the version of the board, the shim's process
new CASE             case number CASE, the last one in the lane, set a cell for the first time
suspect CASE STATUS  the case ended with a wait status that is not 0, or a fault was counted
                     meanwhile; ``none`` if it did not end (the machine died)
timeout CASE         the case did not end in time; it may still run
reset REASON         the guest is to be reset now: ``every`` (the board's ``reset_every``)
failed TEXT          the shim cannot work, and ends: the only message without a ``go``
==================== ============================================================================

One message is sent for a case: ``suspect`` and ``timeout`` cases may have new cells too. If either
side closes the socket, the other ends its work with the lane. A shim that vanishes may leave a case
that still runs (``DONE`` of the lane differs from ``CASE``).
"""

from __future__ import annotations

import array
import socket
from dataclasses import dataclass
from typing import Final

from bridge.errors import InfrastructureError
from bridge.fuzz import board

__all__ = [
    "GO",
    "MESSAGE_BYTES",
    "WELCOME",
    "Hello",
    "Message",
    "MessageError",
    "NewCells",
    "ResetWanted",
    "ShimFailed",
    "SuspectCase",
    "TimedOut",
    "parse",
    "receive",
    "send_go",
    "send_welcome",
]

MESSAGE_BYTES: Final = 256
WELCOME: Final = b"welcome"
GO: Final = b"go"


class MessageError(InfrastructureError):
    """The program on the slot's socket does not speak the shim's protocol."""


@dataclass(frozen=True)
class Hello:
    """A shim is there."""

    version: int
    pid: int

    def encode(self) -> bytes:
        """Return the datagram."""
        return f"hello {self.version} {self.pid}".encode()


@dataclass(frozen=True)
class NewCells:
    """The last case set cells of the map for the first time."""

    case: int

    def encode(self) -> bytes:
        """Return the datagram."""
        return f"new {self.case}".encode()


@dataclass(frozen=True)
class SuspectCase:
    """The last case ended badly, or something went wrong while it ran.

    Attributes:
        status: a wait status; None if the case did not end.
    """

    case: int
    status: int | None

    def encode(self) -> bytes:
        """Return the datagram."""
        return f"suspect {self.case} {'none' if self.status is None else self.status}".encode()


@dataclass(frozen=True)
class TimedOut:
    """The last case did not end in time."""

    case: int

    def encode(self) -> bytes:
        """Return the datagram."""
        return f"timeout {self.case}".encode()


@dataclass(frozen=True)
class ResetWanted:
    """The guest is to be reset now."""

    reason: str

    def encode(self) -> bytes:
        """Return the datagram."""
        return f"reset {self.reason}".encode()


@dataclass(frozen=True)
class ShimFailed:
    """The shim cannot work, and ends; the engine hides what it writes to stderr."""

    reason: str

    def encode(self) -> bytes:
        """Return the datagram."""
        return f"failed {self.reason}".encode()


Message = Hello | NewCells | SuspectCase | TimedOut | ResetWanted | ShimFailed


def parse(datagram: bytes) -> Message:
    """Return what a datagram of the shim says.

    Raises:
        MessageError: it is not a message.
    """
    try:
        match datagram.decode("ascii").split(" "):
            case ["hello", version, pid]:
                return Hello(_number(version), _number(pid))
            case ["new", case]:
                return NewCells(_number(case))
            case ["suspect", case, "none"]:
                return SuspectCase(_number(case), None)
            case ["suspect", case, status]:
                return SuspectCase(_number(case), _number(status))
            case ["timeout", case]:
                return TimedOut(_number(case))
            case ["reset", reason] if reason:
                return ResetWanted(reason)
            case ["failed", *reason] if reason:
                return ShimFailed(" ".join(reason))
    except ValueError:
        pass
    raise MessageError(f"the shim sent {datagram[:80]!r}, which is not a message")


def receive(connection: socket.socket) -> Message | None:
    """Wait for the shim's next message; None at its end.

    Raises:
        MessageError: what came is not a message, or a ``hello`` of another version.
        OSError: as :meth:`socket.socket.recv`.
    """
    try:
        datagram = connection.recv(MESSAGE_BYTES)
    except ConnectionResetError:
        return None
    if not datagram:
        return None
    message = parse(datagram)
    if isinstance(message, Hello) and message.version != board.VERSION:
        raise MessageError(
            f"the shim has version {message.version} of the board, the slot has {board.VERSION}",
            hint="start the shim that belongs to this kcov-bridge",
        )
    return message


def send_welcome(
    connection: socket.socket, region: int, board_fd: int, faults: int | None = None
) -> None:
    """Answer a ``hello`` with the descriptors of region and board, and of the target's count."""
    fds = array.array("i", [region, board_fd, *([faults] if faults is not None else [])])
    connection.sendmsg([WELCOME], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


def send_go(connection: socket.socket) -> None:
    """Let the shim continue."""
    connection.send(GO)


def _number(text: str) -> int:
    # int() also takes signs, spaces and underscores.
    if not text.isdigit():
        raise ValueError(text)
    return int(text)
